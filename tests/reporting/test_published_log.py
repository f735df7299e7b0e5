from finetuning.reporting.published_log import accuracy_lines, end_of_training, epoch_line, step_line


def test_step_line_has_the_published_format():
    point = {"step": 50, "train_loss": 0.6824, "validation_loss": 0.7056}
    assert step_line(2, point) == "Ep 2 (Step 000050): Train loss 0.682, Val loss 0.706"


def test_epoch_line_has_the_published_format():
    metrics = {"step": 4375, "train_accuracy": 0.95, "validation_accuracy": 1.0}
    assert epoch_line(metrics) == "Training accuracy: 95.00% | Validation accuracy: 100.00%"


def test_end_of_training_states_minutes():
    # 569 / 60 = 9.4833
    assert end_of_training(569) == "Training completed in 9.48 minutes.\n\nEvaluating on the full datasets ...\n"


def test_accuracy_lines_have_the_published_order_and_noun():
    accuracies = {"test": 0.9188, "train": 0.9564, "validation": 0.9232}
    assert accuracy_lines(accuracies).splitlines() == [
        "Training accuracy: 95.64%",
        "Validation accuracy: 92.32%",
        "Test accuracy: 91.88%",
    ]
    assert accuracy_lines(accuracies, "Accuracy").splitlines()[-1] == "Test Accuracy: 91.88%"
