"""The step of a whole model, from steps of one layer of each kind, of one layer more, and of all layers on a few tokens.

Layers of a kind are alike, so everything that is counted in a micro-batch is linear in their number. The update, the reduction of
gradients and what lies in memory between micro-batches do not depend on the length of the sequences: they are taken from the whole
model, rehearsed on the shortest sequences that it reads.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from hope_megatron.config.model import ModelConfig
from hope_megatron.config.run import RunConfig
from hope_megatron.rehearse.memory import Segment
from hope_megatron.rehearse.step import Recording
from hope_megatron.rehearse.tally import Tally, combined

_LAYER = ("forward/layer ", "backward/layer ")
_SHORTEST_TOKENS = 8
"""A single token would be read by other strides than many are."""
_AFTER = ("reduction/", "update/")


def short_tokens(config: RunConfig) -> int:
    """The shortest sequence that the model reads as it reads long ones: whole chunks and clocks."""
    model = config.model
    parts = [_SHORTEST_TOKENS, config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1]
    if "memory" in model.mixers:
        parts.append(max(model.memory.chunk_tokens, model.memory.self_chunk))
    parts += [2 * level.inner_chunk_tokens for level in model.cms.levels if level.ticks and level.inner_chunk_tokens]
    return min(math.lcm(*parts), config.training.truncate_tokens or config.training.seq_length)


def shallow(config: RunConfig) -> dict[str | None, RunConfig]:
    """The run with one layer of each kind (None), and with one more of a kind."""
    kinds = tuple(dict.fromkeys(config.model.mixers))
    return {None: _with_layers(config, kinds)} | {kind: _with_layers(config, (*kinds, kind)) for kind in kinds}


def _with_layers(config: RunConfig, mixers: tuple[str, ...]) -> RunConfig:
    model = config.model.model_dump() | {"num_layers": len(mixers), "layer_pattern": mixers}
    return config.model_copy(update={"model": ModelConfig(**model)})


@dataclass
class Depths:
    """Recordings, and the run they are of."""

    config: RunConfig
    accumulation: int
    shallow: dict[str | None, tuple[Recording, Recording]]
    """By the kind of the additional layer: (a step of short micro-batches, a step whose last one is of full length)."""
    whole: Recording
    """All layers, a step of up to three short micro-batches."""
    updates: list[tuple[Recording, float]]
    """All layers, steps of each kind, and the share of steps of that kind."""

    def micro_batch(self) -> Tally:
        """A micro-batch that is neither the first nor the last of its step, if there is one such."""
        tally = self._linear({kind: self._middle(*pair) for kind, pair in self.shallow.items()})
        whole = self.whole.passes[1] if self.accumulation > 1 else self.whole.passes[0]
        return combined((1, tally), (-1, _only(tally, "reduction")), (1, _only(whole, "reduction")))

    def step(self) -> Tally:
        """A step: all micro-batches, reduction and the mean update."""
        terms = [(float(self.accumulation), self.micro_batch())]
        each = self._beside_micro_batch()
        for recording, share in self.updates:
            terms += [(share, recording.rest), (share * (self.accumulation - len(recording.passes)), each)]
        if self.accumulation > 1:
            first, middle, last = self.whole.passes
            terms += [(1, first), (-2, middle), (1, last)]
        return combined(*terms)

    def _beside_micro_batch(self) -> Tally:
        """Operators that a step runs for each micro-batch outside of it: counting tokens, adding losses."""
        if self.accumulation == 1:
            return Counter()
        short, full = self.shallow[None]
        three, two = (
            Counter({key: n for key, n in _only(recording.rest, "other").items() if key[0] in ("op", "kernels")})
            for recording in (short, full)
        )
        return combined((1, three), (-1, two))

    def _middle(self, short: Recording, full: Recording) -> Tally:
        if self.accumulation == 1:
            return full.passes[0]
        _, middle, last = short.passes
        return combined((1, full.passes[-1]), (1, middle), (-1, last))

    def at_rest(self) -> dict[str, int]:
        """Bytes alive between micro-batches by what they are. What layers keep from pass to pass, such as tables, is found where
        they really ran."""
        other = {kind: Counter({"other": full.alive_at_start["other"]}) for kind, (_, full) in self.shallow.items()}
        return self.whole.alive_at_start | {"other": round(self._linear(other)["other"])}

    def _linear(self, tallies: dict[str | None, Counter]) -> Counter:
        """That of the whole model from those of the shallow ones."""
        more = [(count - 1.0, kind) for kind, count in Counter(self.config.model.mixers).items()]
        return combined((1 - sum(n for n, _ in more), tallies[None]), *((n, tallies[kind]) for n, kind in more))

    def timeline(self) -> list[Segment] | None:
        """Memory over the last micro-batch and what follows, for all layers; None where the model does not go through its
        layers forward and backward, each once or once a window."""
        base = _runs(_split_tail(self.shallow[None][1].segments)[0])
        added = {
            kind: _runs(_split_tail(full.segments)[0]) for kind, (_, full) in self.shallow.items() if kind is not None
        }
        segments: list[Segment] = []
        if any([direction for direction, _ in runs] != [direction for direction, _ in base] for runs in added.values()):
            return None
        for number, (direction, run) in enumerate(base):
            longer = {kind: runs[number][1] for kind, runs in added.items()}
            more = 1 if direction else 0
            if (direction and len(run) != len(added)) or any(len(x) != len(run) + more for x in longer.values()):
                return None
            if direction:
                segments += self._layers(direction, longer)
                continue
            for i, segment in enumerate(run):
                segments.append(self._around_layers(segment, {kind: other[i] for kind, other in longer.items()}))
        return segments + _split_tail(self.whole.segments)[1]

    def _around_layers(self, base: Segment, longer: dict[str, Segment]) -> Segment:
        """A segment outside of the layers: what it frees may have been kept by each of them."""
        shallow: dict[str | None, Segment] = {None: base}
        shallow.update(longer)
        sizes = self._linear({k: Counter({"net": s.net, "high": s.high}) for k, s in shallow.items()})
        net, high = round(sizes["net"]), round(max(sizes["net"], sizes["high"]))
        at_high = self._linear({kind: segment.at_high for kind, segment in shallow.items()})
        at_end = self._linear({kind: segment.at_end for kind, segment in shallow.items()})
        return Segment(base.name, net, high, (*base.trace[:-1], net), at_high, at_end)

    def _layers(self, direction: str, longer: dict[str, list[Segment]]) -> list[Segment]:
        """All layers in one direction, the first one as it is after the embedding or the loss, the others as after a layer.

        longer: by kind, the layers of the model that has one more of it.
        """
        backward = direction.startswith("backward")
        mixers = self.config.model.mixers[::-1] if backward else self.config.model.mixers
        first = longer[mixers[0]][0]
        after_a_layer = {kind: [s for s in run[1:] if s.name == direction + kind][-1] for kind, run in longer.items()}
        return [first] + [after_a_layer[mixer] for mixer in mixers[1:]]


def _split_tail(segments: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    """What comes before the last backward's end, and what follows it."""
    end = len(segments)
    while end and segments[end - 1].name.startswith(_AFTER):
        end -= 1
    return segments[:end], segments[end:]


def _runs(segments: list[Segment]) -> list[tuple[str, list[Segment]]]:
    """Consecutive segments of layers in one direction, and what lies between."""
    direction = lambda segment: next((prefix for prefix in _LAYER if segment.name.startswith(prefix)), "")  # noqa: E731
    return [(prefix, list(run)) for prefix, run in itertools.groupby(segments, direction)]


def _only(tally: Tally, phase: str) -> Tally:
    return Counter({key: value for key, value in tally.items() if key[1] == phase})
