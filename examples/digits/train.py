"""Train the digits DiT (or, with --classifier, the classifier) and write its checkpoint.

python examples/digits/train.py                # about 50 minutes on one CPU core
python examples/digits/train.py --classifier   # under a minute
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from examples.digits.arguments import output_file, usable_device, whole_number
from examples.digits.checkpoint import CLASSIFIER_PATH, MODEL_PATH, load_classifier, save_model, save_weights
from examples.digits.classifier import DigitsClassifier
from examples.digits.data import Digits, load_split
from examples.digits.metrics import agreement, expert_load
from examples.digits.model import DigitsDiT
from examples.digits.sampling import generate

LABEL_DROPOUT = 0.1
BALANCE_WEIGHT = 0.02
EMA_DECAY = 0.999
WARMUP_STEPS = 200
LOG_EVERY = 100
SAVE_EVERY = 250
EVALUATED = 200  # images sampled after training

Tensors = list[Tensor] | tuple[Tensor, ...]


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to 1%."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def flow_loss(model: DigitsDiT, images: Tensor, labels: Tensor) -> Tensor:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, velocity = noise - x_0; t is logit-normal."""
    noise = torch.randn_like(images)
    t = torch.sigmoid(1.2 * torch.randn(len(images), device=images.device))
    x_t = torch.lerp(images, noise, t[:, None, None, None])
    dropped = torch.rand(len(labels), device=labels.device) < LABEL_DROPOUT
    y = torch.where(dropped, model.y_embedder.null_class, labels)
    with torch.autocast(images.device.type, torch.bfloat16):
        velocity = model(x_t, t, y)
    return F.mse_loss(velocity.float(), noise - images)


def balance_loss(model: DigitsDiT) -> Tensor:
    losses = [layer.gate.balance_loss for layer in model.moe_layers()]
    return torch.stack([loss for loss in losses if loss is not None]).mean()


def ema_update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
    """Moving average of the weights. Its decay is smaller at first, so that early checkpoints are usable."""
    decay = min(EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def random_batch(data: Digits, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data.labels), (size,))
    return data.images[rows].to(device), data.labels[rows].to(device)


def optimize(model: DigitsDiT, args: argparse.Namespace, progress: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Train for the steps in ``progress`` (1, 2, ...); yields each step with its detached flow loss."""
    data, _ = load_split()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    for step in progress:
        loss = flow_loss(model, *random_batch(data, args.batch, args.device))
        (loss + BALANCE_WEIGHT * balance_loss(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.detach()


def train_model(args: argparse.Namespace, console: Console) -> None:
    model = DigitsDiT().to(args.device).train()
    ema = AveragedModel(model, multi_avg_fn=ema_update)
    averaged = cast(DigitsDiT, ema.module)
    training = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step, loss in optimize(model, args, track(range(1, args.steps + 1), "training", console=console)):
        ema.update_parameters(model)
        losses.append(loss)
        if step % LOG_EVERY == 0:
            mean_loss = torch.stack(losses[-LOG_EVERY:]).mean().item()
            rate = step * args.batch / (time.perf_counter() - start)
            console.print(f"step {step}: loss {mean_loss:.4f}, {rate:.0f} samples/s")
        if step % SAVE_EVERY == 0:
            save_model(averaged, args.work / f"step{step:06d}.safetensors", step=step, training=training)
    save_model(averaged, args.out, step=args.steps, training=training)
    console.print(f"wrote {args.out} after {time.perf_counter() - start:.0f} s")
    evaluate(averaged, console)


def evaluate(model: DigitsDiT, console: Console) -> None:
    """Print how evenly sampling uses the experts, and how many samples are of the requested class."""
    labels = torch.arange(EVALUATED) % 10
    device = next(model.parameters()).device
    with expert_load(model.eval()) as load:
        images = generate(model, labels.to(device), steps=20)
    for name, shares in load().items():
        console.print(f"{name}: load {' '.join(f'{share:.1%}' for share in shares.tolist())}")
    if CLASSIFIER_PATH.is_file():
        console.print(f"classifier agreement {agreement(load_classifier(), images, labels):.1%}")


def train_classifier(args: argparse.Namespace, console: Console) -> None:
    data, held_out = load_split()
    classifier = DigitsClassifier().to(args.device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    for _ in track(range(args.steps), "training", console=console):
        images, labels = random_batch(data, args.batch, args.device)
        # A little noise, so that the classifier learns strokes and not single gray levels.
        logits = classifier(images + 0.1 * torch.randn_like(images))
        F.cross_entropy(logits, labels, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        predicted = classifier(held_out.images.to(args.device)).argmax(dim=1).cpu()
    accuracy = (predicted == held_out.labels).float().mean().item()
    save_weights(classifier, args.out, held_out_accuracy=accuracy)
    console.print(f"held-out accuracy {accuracy:.4f}, wrote {args.out}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", action="store_true", help="train the classifier instead of the DiT")
    parser.add_argument("--steps", type=whole_number(1), help="optimizer steps (default 6500, classifier 1500)")
    parser.add_argument("--batch", type=whole_number(1), help="images a step (default 32, classifier 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the DiT")
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default_device, help=f"({default_device})")
    parser.add_argument("--out", type=output_file(".safetensors"), help="checkpoint to write")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "runs", help="intermediate checkpoints")
    args = parser.parse_args(argv)
    args.steps = args.steps or (1500 if args.classifier else 6500)
    args.batch = args.batch or (128 if args.classifier else 32)
    args.out = args.out or (CLASSIFIER_PATH if args.classifier else MODEL_PATH)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    (train_classifier if args.classifier else train_model)(args, Console())


if __name__ == "__main__":
    main()
