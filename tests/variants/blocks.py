"""Blocks and whole models, with the steps of their forward as functions of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.variants.attention import Attending, Attention, angles
from tests.variants.conditioning import CLASSES, TEXT_WIDTH, AdaLN, Condition, Modulation, joined, modulate, texts
from tests.variants.dispatch import DISPATCHES, Layer, Layering
from tests.variants.experts import BODIES
from tests.variants.pairs import PAIRED
from tests.variants.statements import with_statements

CHANNELS = 2


@dataclass(frozen=True)
class Blocking:
    """One block: attention, perhaps a depthwise convolution, then experts or (a name in BODIES) a dense network.

    convolution: None, "residual" (h + conv(h)) or "inside" (the feed-forward reads the norm of conv(h))
    """

    attending: Attending = field(default_factory=Attending)
    feedforward: Layering | str = field(default_factory=Layering)
    convolution: str | None = None


@dataclass(frozen=True)
class Modelling:
    """A whole model and what it is called with.

    chunks, gate: of adaLN (conditioning.AdaLN); stream_first: the order of residual operands
    label: "class", "text" (a vector) or "none"; timestep: "float", "long" or "scalar"
    skip: None, "add" or "cat": from the first block's input to the last block's
    """

    blocks: tuple[Blocking, ...]
    width: int = 16
    side: int = 3
    batch: int = 2
    chunks: int = 6
    gate: str = "plain"
    stream_first: bool = True
    label: str = "class"
    timestep: str = "float"
    skip: str | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def text(self) -> bool:
        return self.chunks == 12

    @property
    def padded(self) -> bool:
        return any(block.attending.mask == "padding" for block in self.blocks)


@dataclass(frozen=True)
class Context:
    """What a block knows besides the stream: condition (B, width), text tokens, padding, rotary angles."""

    condition: Tensor
    text: Tensor | None
    keep: Tensor | None
    rope: Tensor


class Block(nn.Module):
    def __init__(self, how: Blocking, model: Modelling) -> None:
        super().__init__()
        width = model.width
        self.how, self.stream_first = how, model.stream_first
        self.adaln = AdaLN(model.chunks, model.gate, width)
        learned = model.chunks == 0
        self.norm1 = nn.LayerNorm(width, elementwise_affine=learned, eps=1e-6)
        self.attn = Attention(how.attending, width, model.tokens)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=learned, eps=1e-6)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width) if how.convolution else None
        if isinstance(how.feedforward, Layering):
            kind = with_statements((DISPATCHES | PAIRED)[how.feedforward.dispatch], how.feedforward.beside)
            self.mlp: nn.Module = kind(how.feedforward, width)
        else:
            self.mlp = BODIES[how.feedforward](width, 2 * width)
        if model.text:
            self.text_norm = nn.LayerNorm(width, elementwise_affine=False)
            self.text_mlp = nn.Linear(width, width)

    def forward(self, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        parts = self.modulations(context)
        text = self.text_of(context, parts)
        attention = self.attn(self.attention_input(h, parts), context.rope, text, context.keep)
        h = self.after_attention(self.join(h, attention, parts[0]))
        out = self.called(self.mlp_input(h, parts), self.seen(h, context, parts), context)
        return self.join(h, out, parts[1]), self.next_text(context.text, parts)

    def modulations(self, context: Context) -> tuple[Modulation, ...]:
        return self.adaln(context.condition)

    def attention_input(self, h: Tensor, parts: tuple[Modulation, ...]) -> Tensor:
        return modulate(self.norm1(h), parts[0])

    def text_of(self, context: Context, parts: tuple[Modulation, ...]) -> Tensor | None:
        if context.text is None or not self.how.attending.text:
            return None
        return modulate(self.text_norm(context.text), parts[2])

    def next_text(self, text: Tensor | None, parts: tuple[Modulation, ...]) -> Tensor | None:
        if text is None:
            return None
        return joined(text, self.text_mlp(modulate(self.text_norm(text), parts[3])), parts[3].gate, True)

    def join(self, h: Tensor, out: Tensor, part: Modulation) -> Tensor:
        return joined(h, out, part.gate, self.stream_first)

    def after_attention(self, h: Tensor) -> Tensor:
        return h + self.convolved(h) if self.how.convolution == "residual" else h

    def convolved(self, h: Tensor) -> Tensor:
        assert self.conv is not None
        side = int(h.shape[1] ** 0.5)
        grid = h.transpose(1, 2).unflatten(-1, (side, side))
        return self.conv(grid).flatten(2).transpose(1, 2)

    def normed(self, h: Tensor) -> Tensor:
        return self.norm2(self.convolved(h) if self.how.convolution == "inside" else h)

    def mlp_input(self, h: Tensor, parts: tuple[Modulation, ...]) -> Tensor:
        return modulate(self.normed(h), parts[1])

    def seen(self, h: Tensor, context: Context, parts: tuple[Modulation, ...]) -> Tensor:
        """What the router reads, (B, N, width or twice that)."""
        reads = self.how.feedforward.reads if isinstance(self.how.feedforward, Layering) else "same"
        x = self.normed(h) if reads in ("unmodulated", "both") else self.mlp_input(h, parts)
        return torch.cat([x, self.timed(h, context)], dim=-1) if reads in ("timed", "both") else x

    def timed(self, h: Tensor, context: Context) -> Tensor:
        return context.condition.unsqueeze(1).expand(-1, h.shape[1], -1)

    def extra(self, x: Tensor, context: Context) -> Tensor | None:
        kind = self.how.feedforward.extra if isinstance(self.how.feedforward, Layering) else None
        if kind is None:
            return None
        return self.timed(x, context) if kind == "time" else x.mean(dim=1, keepdim=True).expand(-1, x.shape[1], -1)

    def called(self, x: Tensor, seen: Tensor, context: Context) -> Tensor:
        if not isinstance(self.mlp, Layer):
            return self.mlp(x)
        extra = self.extra(x, context)
        if not self.mlp.how.flat:
            return self.mlp(x, seen, extra)
        rows, seen = x.flatten(0, 1), seen.flatten(0, 1)
        return self.mlp(rows, seen, extra if extra is None else extra.flatten(0, 1)).view(x.shape)


class Model(nn.Module):
    """forward(x (B, CHANNELS, side, side), t, *further inputs) -> the shape of x."""

    rope: Tensor

    def __init__(self, how: Modelling) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Conv2d(CHANNELS, how.width, 1)
        self.condition = Condition(how.label, how.width)
        self.blocks = nn.ModuleList(Block(block, how) for block in how.blocks)
        self.norm = nn.LayerNorm(how.width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(how.width, CHANNELS)
        if how.text:
            self.embed_text = nn.Linear(TEXT_WIDTH, how.width)
        if how.skip == "cat":
            self.skip = nn.Linear(2 * how.width, how.width)
        head = how.width // how.blocks[0].attending.heads
        self.register_buffer("rope", angles(how.tokens, head), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None, keep: Tensor | None) -> Tensor:
        h, context = self.start(x, t, y, text, keep)
        first = h
        for number, block in enumerate(self.blocks):
            h = self.skipped(h, first, number)
            h, text = block(h, context)
            context = Context(context.condition, text, keep, self.rope)
        return self.finish(h, context)

    def start(
        self, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Context]:
        h = self.embed(x).flatten(2).transpose(1, 2)
        c = self.condition(t, y, len(x))
        if self.how.chunks == 0:
            h = h + c.unsqueeze(1)
        text = None if text is None else self.embed_text(text)
        return h, Context(c, text, keep, self.rope)

    def skipped(self, h: Tensor, first: Tensor, number: int) -> Tensor:
        if self.how.skip is None or number == 0 or number != len(self.blocks) - 1:
            return h
        return h + first if self.how.skip == "add" else self.skip(torch.cat([h, first], dim=-1))

    def finish(self, h: Tensor, context: Context) -> Tensor:
        out = self.head(self.norm(h) + context.condition.unsqueeze(1))
        return out.transpose(1, 2).unflatten(-1, (self.how.side, self.how.side))


def make_model(how: Modelling) -> Model:
    torch.manual_seed(how.seed)
    model = Model(how).eval().requires_grad_(False).to(how.dtype)
    model.rope = angles(how.tokens, how.width // how.blocks[0].attending.heads)
    return model


def moving(noise: Tensor, step: int) -> Tensor:
    """A picture at a step, which goes on from that of the step before, and is new everywhere."""
    for _ in range(step):
        noise = 0.9 * noise + 0.3 * noise.roll(1, -1)
    return noise


def make_inputs(how: Modelling, seed: int = 1) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Noise (B, CHANNELS, side, side), and what the model takes after the timestep."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(how.batch, CHANNELS, how.side, how.side, generator=generator).to(how.dtype)
    y: Tensor | None = None
    if how.label == "class":
        y = torch.randint(CLASSES, (how.batch,), generator=generator)
    elif how.label == "text":
        y = torch.randn(how.batch, TEXT_WIDTH, generator=generator).to(how.dtype)
    text = texts(how.batch, 4, generator).to(how.dtype) if how.text else None
    keep = None
    if how.padded:
        lengths = torch.randint(how.tokens // 2, how.tokens + 1, (how.batch, 1), generator=generator)
        keep = torch.arange(how.tokens) < lengths
    return noise, (y, text, keep)


def timestep(how: Modelling, step: int, steps: int) -> Tensor:
    """The timestep of an Euler step from 1 to 0."""
    time = 1 - step / steps
    if how.timestep == "scalar":
        return torch.tensor(time)
    if how.timestep == "long":
        return torch.full((how.batch,), round(1000 * time), dtype=torch.long)
    return torch.full((how.batch,), time)
