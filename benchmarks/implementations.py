"""Timings of one workload in the reference loop, the Hugging Face Trainer and this project.

All start from the same weights and see the same reviews in the same batches of eight.
"""

import itertools
import statistics
import tempfile
import time
from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import AutoTokenizer

import train_bert_hf
import train_gpt
from benchmarks import limits, reference
from benchmarks.timing import StepClock, timed
from benchmarks.workloads import Workload
from finetuning.data.batching import IMDbDataset
from finetuning.data.reviews import load_dataframes
from finetuning.experiment import RunContext, Task, setup_model
from finetuning.optimizers import WEIGHT_DECAY, build_optimizers
from finetuning.performance.device import peak_memory, select_device
from finetuning.performance.frozen_cache import cache_frozen_outputs
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.system.errors import UserError
from finetuning.trainable_layers import set_trainable
from finetuning.training import TrainConfig, TrainState, train_classifier

BATCH_SIZE = 8
FINAL_REVIEWS = 50_000  # evaluated at the end of a published run
LOG_SAMPLE = 2 * 160  # reviews evaluated for a log line


class PreparedRun(NamedTuple):
    """What a train script passes to `finetune`, the reviews limited to those of the benchmark."""

    context: RunContext
    task: Task
    train: IMDbDataset  # at least `steps` + 1 batches


def prepare(args: Namespace, workload: Workload, *flags: str) -> PreparedRun:
    """Run a train script up to `finetune`."""
    calls: list[tuple] = []
    original = workload.script.finetune
    workload.script.finetune = lambda *arguments: calls.append(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            workload.script.main([*common_flags(args, workload), *flags, "--output_dir", folder])
    finally:
        workload.script.finetune = original
    context, task, train, *_ = calls[0]
    return PreparedRun(context, task, train.head(num_reviews(args, len(train))))


def common_flags(args: Namespace, workload: Workload) -> list[str]:
    """Return the flags of the train script that do not depend on the implementation."""
    shared = {"--data_dir": args.data_dir, "--context_length": str(args.context_length), "--device": args.device}
    return [*workload.flags, *itertools.chain(*shared.items())]


def num_reviews(args: Namespace, available: int) -> int:
    """Return how many reviews the benchmark reads; raises UserError if the training set is too small."""
    wanted = max(args.reviews, (args.steps + 1) * BATCH_SIZE)
    if wanted > available:
        raise UserError(f"--steps {args.steps} and --reviews {args.reviews} need {wanted} of {available} reviews")
    return wanted


def load_book_model(settings: Namespace) -> torch.nn.Module:
    """Return the book's GPTModel with its new head and its trainable layers, as train_gpt.py starts from it."""
    model = train_gpt.instantiate_model(settings.model_size, settings.weights, settings.seed, settings.models_dir)
    set_trainable(model, settings.trainable_layers, train_gpt.replace_head(model, settings.seed))
    return model


def load_hub_tokenizer(name: str):
    """Return the Hugging Face tokenizer of a model of train_bert_hf.py."""
    source = train_bert_hf.MODELS[name].hub_id if name in train_bert_hf.MODELS else name
    return AutoTokenizer.from_pretrained(source)


def load_tokenizer(workload: Workload, settings: Namespace):
    """Return the `finetuning.data.tokenization.Tokenizer` that the train script uses."""
    if workload.script is train_gpt:
        return train_gpt.make_tokenizer(train_gpt.load_encoding(settings.model_size))
    return train_bert_hf.make_tokenizer(load_hub_tokenizer(settings.model))


def measure_reference(args: Namespace, workload: Workload) -> dict[str, Any]:
    """Time a training step and the evaluation of a review in the reference loop."""
    settings = workload.script.parse_args(common_flags(args, workload))
    frame = load_dataframes(args.data_dir)[0]
    frame = frame.head(num_reviews(args, len(frame)))
    tokenizer = load_tokenizer(workload, settings)
    dataset = reference.ReferenceDataset(frame, tokenizer.encode, args.context_length, tokenizer.pad_token_id)
    if workload.script is train_gpt:
        model, pooling = load_book_model(settings), reference.gpt_logits("last")
        reference.use_eager_ops(model)
    else:
        model, pooling = prepare(args, workload).task.model, reference.encoder_logits
        model.set_attn_implementation("eager")
    device = select_device(args.device)
    model.to(device)
    _, steps = reference.train(
        model, pooling, dataset, learning_rate=settings.learning_rate, max_steps=args.steps, shuffle=False
    )
    sample, texts = Subset(dataset, range(args.reviews)), frame["text"].head(args.reviews).tolist()
    return {
        "step": statistics.median(steps[1:]),
        "review": timed(reference.evaluate, model, pooling, sample) / args.reviews,
        "tokenizing": timed(lambda: [tokenizer.encode([text], args.context_length) for text in texts]),
        "peak_memory": peak_memory(device),
    }


def measure_trainer(args: Namespace, workload: Workload, precision: str) -> dict[str, Any]:
    """Time a training step and the evaluation of a review in the Hugging Face Trainer."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback  # the Trainer needs accelerate

    context, task, train = prepare(args, workload)
    clock = StepClock(context.device, args.steps)

    class ClockCallback(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock()

    items = [{"input_ids": ids.tolist(), "labels": label} for ids, label in (train[i] for i in range(len(train)))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            task.model,
            trainer_arguments(args, context, precision, folder),
            data_collator=DataCollatorWithPadding(load_hub_tokenizer(context.args.model)),
            train_dataset=items,
            callbacks=[ClockCallback()],
        )
        trainer.train()
        if context.device.type != "cpu":
            trainer.predict(items[: args.reviews])  # warm-up: libraries choose kernels for each shape
        review = timed(trainer.predict, items[: args.reviews]) / args.reviews
    step = statistics.median(clock.seconds())
    return {"step": step, "review": review, "peak_memory": peak_memory(context.device)}


def trainer_arguments(args: Namespace, context: RunContext, precision: str, folder: str):
    """Return the TrainingArguments of the same training; the optimizer is the Trainer's default AdamW."""
    from transformers import TrainingArguments

    is_cpu = context.device.type == "cpu"
    return TrainingArguments(
        output_dir=folder,
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        bf16=precision == "bf16",
        max_steps=args.steps + 1,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",
        learning_rate=context.args.learning_rate,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def measure_project(args: Namespace, workload: Workload, *flags: str) -> dict[str, Any]:
    """Time a training step, the evaluation of a review and what is done once; compare them with the device's limit."""
    context, task, train = prepare(args, workload, "--precision", args.precision, *flags)
    # Before `setup_model`, which may compile the model.
    flops = limits.count_flops(task.model, task.pooling, int(train.lengths.max()))
    shapes = limits.linear_shapes(task.model, task.head)
    classifier, _ = setup_model(context, task)
    seconds: dict[str, Any] = {"precision": context.precision}
    started = time.perf_counter()
    classifier, (cached, _) = cache_frozen_outputs(context.args, classifier, task.head, train, train.head(1))
    caching = time.perf_counter() - started
    is_cached = classifier.model is task.head
    if is_cached:
        seconds["caching"] = caching / len(train) * FINAL_REVIEWS
    elif cached.cached_sample is not None:
        count = len(cached.cached_sample)
        seconds["log_caching"] = caching / count * LOG_SAMPLE
        seconds["log_review"] = timed(predict_logits, cached.cached_sample, classifier) / count
    steps = time_steps(args, context.args.learning_rate, classifier, cached)
    sample = cached.head(args.reviews) if is_cached else train.head(args.reviews)
    warm_up = 0.0
    if classifier.device.type != "cpu" or context.args.compile:
        warm_up = timed(predict_logits, sample, classifier)  # compilation, and the choice of kernels for each shape
    seconds["step"] = statistics.median(steps.seconds())
    seconds["review"] = timed(predict_logits, sample, classifier) / len(sample)
    if context.args.compile:
        seconds["compiling"] = steps.warm_up() + warm_up - seconds["review"] * len(sample)
    encode, texts = load_tokenizer(workload, context.args).encode, load_dataframes(args.data_dir)[0]["text"]
    seconds["tokenizing"] = timed(encode, texts.head(args.reviews).tolist(), args.context_length)
    seconds["peak_memory"] = peak_memory(classifier.device)
    if is_cached:
        return seconds  # the head alone is not limited by arithmetic
    rate = limits.matmul_throughput(shapes, classifier.eval_tokens, context.precision, classifier.device)
    return seconds | flops_utilization(args, flops, train.computed_lengths(), steps, seconds["review"], rate)


def time_steps(args: Namespace, learning_rate: float, classifier: Classifier, train: IMDbDataset) -> StepClock:
    """Train on batches in the order of the file; return the clock that timed the steps."""
    clock = StepClock(classifier.device, args.steps)
    train_classifier(
        classifier,
        build_optimizers("adamw", classifier.model, learning_rate),
        train,
        train.head(1),
        # Only the first and the last step log, and neither is timed.
        TrainConfig(batch_size=BATCH_SIZE, max_steps=args.steps + 1, eval_freq=10**9, eval_iter=1),
        TrainState(batches=torch.arange(len(train) // BATCH_SIZE * BATCH_SIZE).view(-1, BATCH_SIZE)),
        [clock],
    )
    return clock


def flops_utilization(
    args: Namespace, flops: limits.Flops, lengths: np.ndarray, clock: StepClock, review: float, rate: float
) -> dict[str, Any]:
    """Return the FLOPs of a step and of a review, and the shares of the device's matrix rate that they reach."""
    batches = lengths[: args.steps * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    step_flops = clock.means([flops.training(batch) for batch in batches])
    rates = [count / seconds for count, seconds in zip(step_flops, clock.seconds(), strict=True)]
    review_flops = flops.evaluation(lengths[: args.reviews]) / args.reviews
    return {
        "matmul_throughput": rate,
        "step_flops": statistics.median(step_flops),
        "step_utilization": statistics.median(rates) / rate,
        "review_flops": review_flops,
        "review_utilization": review_flops / review / rate,
    }
