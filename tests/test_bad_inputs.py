"""Invalid arguments of the train scripts, unusual valid inputs, and errors of whole processes."""

import sys

import pytest
from bad_inputs import SCRIPTS, BadInput, bad_arguments, command, parameters
from helpers import flags, folder_contents
from processes import CONTEXT, end, run_script, start
from tiny_models import TINY_CONFIGS, save_encoder
from transformers import BertConfig


def file_as_output_dir(folder):
    (folder / "run").write_text("a file")


CASES = [
    bad_arguments("--num_epochs", "0", message="--num_epochs: must be a whole number of 1 or more, not '0'"),
    bad_arguments("--max_steps", "-3", message="--max_steps: must be a whole number of 1 or more, not '-3'"),
    bad_arguments("--learning_rate", "-0.001", message="--learning_rate: must be a number above 0, not '-0.001'"),
    bad_arguments("--learning_rate", "inf", message="must be a number above 0, not 'inf'"),
    bad_arguments("--batch_size", "49", message="--batch_size 49 is more than the 48 reviews of the training set"),
    bad_arguments("--batch_size", "2.5", message="must be a whole number of 1 or more, not '2.5'"),
    bad_arguments("--context_length", "65", message="--context_length 65 is more than the 64 tokens", scripts="gpt"),
    bad_arguments("--context_length", "41", message="--context_length 41 is more than the 40 tokens", scripts="bert"),
    bad_arguments("--context_length", "9" * 30, message="tokens this model can read"),
    bad_arguments("--checkpoint_minutes", "0", message="--checkpoint_minutes: must be a number above 0"),
    bad_arguments("--device", "cuda:99", message="--device cuda:99 is not on this machine; it has: "),
    bad_arguments("--device", "tpu", message="--device tpu is no"),
    bad_arguments("--precision", "tf32", "--device", "cpu", message="--precision tf32 is for CUDA, not for cpu"),
    bad_arguments("--data_dir", "nowhere", message="cannot find nowhere/train.csv", scripts="gpt bert logreg"),
    bad_arguments(
        "--output_dir",
        "train.csv",
        message="cannot write to --output_dir train.csv: File exists",
        scripts="gpt bert logreg",
    ),
    bad_arguments(
        "--output_dir",
        "train.csv/run",
        message="cannot write to --output_dir train.csv/run: Not a directory",
        scripts="gpt bert logreg",
    ),
    bad_arguments("--output_dir", "x" * 300, message="File name too long", scripts="gpt bert logreg"),
    BadInput(
        "a file as output folder",
        "cannot write to --output_dir run: File exists",
        file_as_output_dir,
        scripts="gpt bert logreg",
    ),
    bad_arguments("--resume", message="--resume: there is no checkpoint at run/checkpoint.pt"),
    bad_arguments(
        "--model", "nonsense", message="cannot load --model nonsense; it is none of distilbert, bert", scripts="bert"
    ),
    bad_arguments("--model", "a/b/c", message="cannot load --model a/b/c", scripts="bert"),
    bad_arguments("--model", "roberta", message="cannot load --model roberta", scripts="bert"),
    bad_arguments("--model", "data", message="cannot load --model data", scripts="bert"),
    bad_arguments("--model_size", "gpt2-huge", message="invalid choice: 'gpt2-huge'", scripts="gpt"),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_arguments_end_in_one_line_and_change_no_file(bad, script, assert_refused):
    assert_refused(bad, script)


def test_valid_inputs_run(input_folder):
    for script, module in SCRIPTS.items():
        module.main(command(script, ["--output_dir", script]))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            "text,label\n" + "\N{GRINNING FACE} \u05d8\u05d5\u05d1 \u0637\u064a\u0628,1\nbad,0\n" * 24,
            id="emoji and right-to-left text",
        ),
        pytest.param("\ufefftext,label\n" + "good,1\nbad,0\n" * 24, id="a BOM"),
        pytest.param("text,label\n" + "good " * 200_000 + ",1\n" + "bad,0\n" * 47, id="a review of a megabyte"),
        pytest.param("label,text,more\r\n" + '1,"two\nlines, ""quoted""",x\r\n0,NaN,y\r\n' * 24, id="quotes and NaN"),
    ],
)
@pytest.mark.parametrize("script", ["bert", "logreg"])
def test_unusual_valid_csv_runs(script, content, input_folder):
    (input_folder / "data" / "train.csv").write_bytes(content.encode())
    (input_folder / "data" / "test.csv").write_text("text,label\ngood,1\n")  # a test set may have one class
    SCRIPTS[script].main(command(script, []))
    assert (input_folder / "run" / "record.json").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_bert_hf", ["--data_dir", "nowhere"], "cannot find nowhere/train.csv"),
        ("train_bert_hf", ["--batch_size", "0"], "must be a whole number of 1 or more"),
        ("train_sklearn_logreg", ["--output_dir", "train.csv/run"], "Not a directory"),
    ],
)
def test_bad_input_of_a_new_process_ends_in_one_line(script, arguments, message, input_folder):
    before = folder_contents(input_folder)
    model = ["--model", "model"] if script == "train_bert_hf" else []
    assert (
        end(start(script, [*model, "--data_dir", "data", *arguments], input_folder.parent / "log", input_folder)) == 2
    )
    assert (input_folder.parent / "log.out").read_text() == ""
    (line,) = (input_folder.parent / "log.err").read_text().splitlines()
    assert message in line
    assert folder_contents(input_folder) == before


def run_with_little_memory(*arguments):
    """Run a script with an address space limit of 150 MB above what the process uses now."""
    import resource

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
    run_script(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_process_out_of_memory_ends_in_advice(input_folder):
    save_encoder(input_folder / "large", BertConfig(**{**TINY_CONFIGS["bert"].to_dict(), "intermediate_size": 40_000}))
    # In bf16 the CPU's library may crash instead.
    arguments = flags(
        model="large", data_dir="data", output_dir="run", context_length=40, batch_size=48, precision="fp32"
    )
    process = CONTEXT.Process(
        target=run_with_little_memory, args=("train_bert_hf", arguments, str(input_folder / "log"), str(input_folder))
    )
    process.start()
    assert end(process) == 2, (input_folder / "log.err").read_text()
    assert (input_folder / "log.err").read_text().splitlines()[-1] == (
        "train_bert_hf.py: out of memory in training; try --micro_batch_size 24 or a shorter --context_length or "
        "--trainable_layers last_block"
    )
    assert not (input_folder / "run").exists()
