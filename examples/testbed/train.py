"""The command that trains a testbed's model, or its classifier, and writes its checkpoint."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from examples.testbed.arguments import output_file, usable_device, whole_number
from examples.testbed.checkpoint import save_model, save_weights
from examples.testbed.classifier import Classifier
from examples.testbed.metrics import agreement, expert_load
from examples.testbed.model import MoEDiT
from examples.testbed.testbed import Testbed, unchanged
from examples.testbed.training import SCHEDULES, Draw, Plan, ResumeError, Training

LOG_EVERY = 100
SAVE_EVERY = 250
EVALUATED = 200  # images sampled after training


def random_batches(testbed: Testbed, device: torch.device) -> Draw:
    """Random training images, augmented as the testbed does."""
    data, _ = testbed.load_split()

    def draw(size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(data.labels), (size,))
        return testbed.augmented(data.images[rows]).to(device), data.labels[rows].to(device)

    return draw


def train_model(testbed: Testbed, plan: Plan, args: argparse.Namespace, console: Console) -> None:
    if args.as_they_are:
        testbed = replace(testbed, augmented=unchanged)
    training, state = Training(MoEDiT(testbed.config).to(args.device), plan), args.work / "state.pt"
    if args.resume:
        as_from_the_start = training.load(state)
        console.print(f"goes on after step {training.step}")
        if not as_from_the_start:
            console.print(
                "until there by the learning rates of another number of steps: a run from the start differs"
            )
    losses: list[Tensor] = []
    start, before = time.perf_counter(), training.step
    steps = training.run(random_batches(testbed, args.device))
    for loss in track(steps, "training", total=max(0, plan.steps - before), console=console):
        losses.append(loss)
        if training.step % LOG_EVERY == 0:
            mean_loss = torch.stack(losses[-LOG_EVERY:]).mean().item()
            rate = len(losses) * plan.batch / (time.perf_counter() - start)
            console.print(f"step {training.step}: loss {mean_loss:.4f}, {rate:.0f} samples/s")
        if training.step % SAVE_EVERY == 0:
            training.save(state)
    training.save(state)
    made = {"step": training.step, "training": asdict(plan)}
    save_model(training.averaged, args.out, testbed.stored, **made)
    console.print(f"wrote {args.out} after {time.perf_counter() - start:.0f} s")
    evaluate(testbed, args.out, args.device, console)


def evaluate(testbed: Testbed, path: Path, device: torch.device, console: Console) -> None:
    """Print how evenly sampling uses the experts, and how many samples are of the requested class."""
    model, labels = testbed.load_model(path).to(device), torch.arange(EVALUATED) % 10
    with expert_load(model) as load:
        images = testbed.generate(model, labels.to(device), steps=20)
    for name, shares in load().items():
        console.print(f"{name}: load from {shares.min():.1%} to {shares.max():.1%}, even is {1 / len(shares):.1%}")
    if testbed.classifier_path.is_file():
        console.print(f"classifier agreement {agreement(testbed.load_classifier(), images, labels):.1%}")


def train_classifier(testbed: Testbed, plan: Plan, args: argparse.Namespace, console: Console) -> None:
    draw, held_out = random_batches(testbed, args.device), testbed.load_split()[1]
    classifier = Classifier(testbed.config.image_size, testbed.config.channels).to(args.device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), plan.lr, weight_decay=1e-2)
    rate = SCHEDULES[plan.schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan.steps))
    for _ in track(range(plan.steps), "training", console=console):
        images, labels = draw(plan.batch)
        # A little noise, so that the classifier learns strokes and not single gray levels.
        logits = classifier(images + 0.1 * torch.randn_like(images))
        F.cross_entropy(logits, labels, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    accuracy = agreement(classifier.cpu().eval(), held_out.images, held_out.labels)
    save_weights(classifier, args.out, testbed.stored, held_out_accuracy=accuracy)
    console.print(f"held-out accuracy {accuracy:.4f}, wrote {args.out}")


def parse_arguments(testbed: Testbed, argv: list[str] | None = None, text: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    model, classifier = testbed.plan, testbed.classifier_plan
    parser.add_argument("--classifier", action="store_true", help="train the classifier instead of the DiT")
    steps = f"optimizer steps (default {model.steps}, classifier {classifier.steps})"
    parser.add_argument("--steps", type=whole_number(1), help=steps)
    batch = f"images a step (default {model.batch}, classifier {classifier.batch})"
    parser.add_argument("--batch", type=whole_number(1), help=batch)
    parser.add_argument("--lr", type=float, help=f"peak learning rate ({model.lr:g}, classifier {classifier.lr:g})")
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default_device, help=f"({default_device})")
    parser.add_argument("--out", type=output_file(".safetensors"), help="checkpoint to write")
    parser.add_argument("--work", type=Path, default=testbed.folder / "runs", help="where the state to resume is")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run of the DiT has left")
    as_they_are = "do not augment the images, also when another run is resumed that did"
    parser.add_argument("--as-they-are", action="store_true", help=as_they_are)
    args = parser.parse_args(argv)
    if args.classifier and (args.resume or args.as_they_are):
        parser.error("--resume and --as-they-are are for the DiT; the classifier trains in a minute")
    args.out = args.out or (testbed.classifier_path if args.classifier else testbed.model_path)
    return args


def chosen_plan(testbed: Testbed, args: argparse.Namespace) -> Plan:
    given = {
        name: getattr(args, name) for name in ("steps", "batch", "lr", "seed") if getattr(args, name) is not None
    }
    return replace(testbed.classifier_plan if args.classifier else testbed.plan, **given)


def main(testbed: Testbed, argv: list[str] | None = None, text: str | None = None) -> int:
    """Train. ``text`` is what --help says first. Returns the exit status."""
    args, console = parse_arguments(testbed, argv, text), Console()
    plan = chosen_plan(testbed, args)
    torch.manual_seed(plan.seed)
    try:
        (train_classifier if args.classifier else train_model)(testbed, plan, args, console)
    except ResumeError as error:
        console.print(f"train.py: {error}")
        return 1
    return 0
