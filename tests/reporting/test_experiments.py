from finetuning.reporting.experiments import Experiment

COUNTS = Experiment(number=8, title="Counts", command="python train_sklearn_logreg.py", name="logreg-counts")


def test_command_line_names_another_seed_and_another_split():
    assert COUNTS.command_line(123) == "python train_sklearn_logreg.py"
    assert COUNTS.command_line(7) == "python train_sklearn_logreg.py --seed 7"
    assert COUNTS._replace(data_dir="official").command_line(7) == (
        "python train_sklearn_logreg.py --seed 7 --data_dir official --output_dir results/official/logreg-counts-seed7"
    )
