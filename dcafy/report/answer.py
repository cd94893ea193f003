"""The answers that stand first in a report, in words: how good, are the connections used, at what cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dcafy.amounts import fixed, operations, percent, points
from dcafy.analysis.listening import MIXED, NEGLIGIBLE, Effect, States, Usage, in_loss
from dcafy.report.findings import Findings, Score
from dcafy.runs.compare import Comparison
from dcafy.runs.evidence import LOSSES, Difference
from dcafy.wording import counted


@dataclass(frozen=True)
class Answer:
    """One question of the reader: the answer in a few words, and what it rests on."""

    question: str
    short: str
    because: tuple[str, ...]


def answers(found: Findings) -> tuple[Answer, ...]:
    """How good it is, whether what is heard in it is used, and what that costs."""
    used = (_used(found),) if found.contributions or not found.handed else ()
    return _accuracy(found), *used, *((_handed(found),) if found.handed else ()), _cost(found)


# --- how good -----------------------------------------------------------------------------------------


def _accuracy(found: Findings) -> Answer:
    question = "How good is it, before and after?"
    compared, own = found.run.comparison, found.connected.score
    scored = [] if own is None else _of_scores(found, own)
    if compared is not None and compared.pairs:
        metric = headline(compared.arms[compared.pairs[0].one].metrics[0])
        if metric:
            short, because = _of_comparison(compared, metric)
            return Answer(question, short, (*because, *scored))
    if own is not None:
        other = found.sides[0].score if len(found.sides) == 2 else None
        short = _score(own) if other is None else f"{percent(other.value)} → {percent(own.value)}"
        return Answer(question, short, tuple(scored))
    trained = found.trained
    metric = "" if trained is None else headline(trained.metrics)
    if trained is not None and metric:
        value, images = trained.metrics[metric], trained.metrics.get("images", 0)
        # A folder may say anything; an interval is for what is a fraction of so many images.
        counts = metric == "top1" and 0 <= value <= 1 <= images < math.inf
        shown = _score(Score(round(value * images), int(images))) if counts else percent(value)
        told = f"{named(metric)} on its validation images after {counted(trained.epochs, 'epoch')}, as its folder says."
        return Answer(question, shown, (told, "What it was before is not known: name labelled images with --data."))
    return Answer(question, "not measured", ("It takes labelled images: dcafy report MODEL --data DATA.",))


def headline(metrics: Mapping[str, float]) -> str:
    """The metric that stands for the others: the accuracy, or the first that is no loss; empty where there is none."""
    return next((name for name in ("top1", *metrics) if name in metrics and name not in (*LOSSES, "images")), "")


def named(metric: str) -> str:
    """A metric in words."""
    return "Top-1 accuracy" if metric == "top1" else metric


def _of_comparison(compared: Comparison, metric: str) -> tuple[str, tuple[str, ...]]:
    pair = compared.pairs[0]
    means = [statistics.fmean(row[metric] for row in compared.arms[arm].metrics) for arm in (pair.other, pair.one)]
    seeds = counted(len(compared.seeds), "seed")
    because = [difference_in_words(pair.differences[metric])] if metric in pair.differences else []
    because.append(f"{named(metric)} on the validation images, {pair.other} → {pair.one}, mean over {seeds}.")
    return f"{percent(means[0])} → {percent(means[1])}", tuple(because)


def _of_scores(found: Findings, own: Score) -> list[str]:
    on = f"{counted(own.images, 'labelled image')} of {found.data}"
    other = found.sides[0].score if len(found.sides) == 2 else None
    if other is None:
        return [f"Top-1 accuracy on {on}: {_score(own)}."]
    titles = f"{found.sides[0].title} → {found.connected.title}"
    told = f"These two networks on {on}, {titles}: {_score(other)} → {_score(own)}."
    gain = [] if found.gain is None else [_over_images(found.gain)]
    return [told, *gain] if found.run.comparison is not None else [*gain, told]


def _score(score: Score) -> str:
    return f"{percent(score.value)} (95%: {percent(score.low)} to {percent(score.high)})"


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return ""
    return f", 95% interval {points(difference.low)} to {points(difference.high)}"


def difference_in_words(difference: Difference) -> str:
    """A difference of accuracies with its interval and verdict."""
    return f"{points(difference.mean)} points{_interval(difference)}: {difference.verdict}."


def _over_images(gain: Difference) -> str:
    """A difference on images that both networks have seen, which says nothing of other trainings."""
    if gain.low is None or gain.high is None:
        return "Both are right on the very same images." if not gain.mean else f"{points(gain.mean)} points."
    verdict = "more" if gain.mean > 0 else "fewer"
    verdict = f"{verdict} of these are named rightly; of other trainings of the two it says nothing"
    if gain.low <= 0 <= gain.high:
        verdict = "no difference that these images could show"
    return f"{points(gain.mean)} points{_interval(gain)} over the images: {verdict}."


# --- are they used ------------------------------------------------------------------------------------


def _used(found: Findings) -> Answer:
    question = "Are the connections used?"
    if not found.contributions:
        return Answer(question, "there are none", ("This network is not connected: dcafy convert MODEL -o DIR.",))
    if found.usage is None:
        largest = max(found.shares.values(), default=0.0)
        said = (
            "Every β is 0, as right after the conversion: nothing is heard yet."
            if not largest
            else f"Messages make up to {percent(largest)} of what a block takes in; that does not say whether "
            "anything depends on them."
        )
        return Answer(question, "not measured", (said, "It takes labelled images: dcafy report MODEL --data DATA."))
    word, sentences = verdict(found.usage)
    return Answer(question, word, sentences if found.data else (*sentences, "So it was at the end of its training."))


def _handed(found: Findings) -> Answer:
    question = "Is the state used that units hand on?"
    states = None if found.usage is None else found.usage.states
    what = tuple(f"{one}." for one in found.handed)
    if found.usage is None or states is None:
        return Answer(question, "not measured", (*what, "It takes labelled images: dcafy report MODEL --data DATA."))
    word, first = _judged(states.cut, found.usage, "Without it")
    others = {"the average one": states.mean, "another image's": states.shuffled}
    told = "; ".join(f"with {name}, by {in_loss(effect)}" for name, effect in others.items() if effect is not None)
    return Answer(question, word, (*what, f"{first}, where zeros stand in its place; {told}.", _alone(states)))


def _alone(states: States) -> str:
    """How many of the modules that hear it matter one by one."""
    alone = [row for row in states.units if row.cut.is_sure and row.cut.loss > NEGLIGIBLE]
    of = counted(len(states.units), "module")
    return f"Cut one at a time, {len(alone)} of {of} cost a loss that is clear of chance (at 95% each)."


def verdict(usage: Usage) -> tuple[str, tuple[str, ...]]:
    """Whether a network uses its connections: in a word, and in sentences with standard errors.

    What counts is what cutting all of them at once does to the loss; then whether it is lost with the average message
    (else they are a bias) and with another image's (else they say nothing of this very image).
    """
    cut = usage.cut
    if all(row.beta == 0 for row in usage.connections):
        return "no", ("Every β is 0, as right after the conversion: nothing is heard yet.",)
    word, first = _judged(cut, usage, "Without them")
    word = "they do harm" if word == _HARM else word
    sentences = [f"{first}, and the accuracy changes by {_points(cut)} points."]
    if word == "yes":
        sentences += _content(usage)
    sentences += _each(usage)
    if usage.shuffled is not None and usage.alike > MIXED:
        sentences.append(
            f"{usage.alike:.0%} of the images heard one of their own class when messages were shuffled, so what is "
            "said of the very image may be worth more than this shows."
        )
    return word, tuple(sentences)


_HARM = "it does harm"


def _judged(cut: Effect, usage: Usage, without: str) -> tuple[str, str]:
    """In a word and in a sentence, which is still without its end, what cutting does to the loss."""
    on = f"on {counted(usage.images, 'image')}"
    if cut.is_sure and cut.loss < -NEGLIGIBLE:
        return _HARM, f"{without} the loss falls by {_loss(cut, -1)} (from {usage.loss:.4f}) {on}"
    if cut.is_negligible:
        return "no", f"{without} the loss stays what it is ({_change(cut)}) {on}"
    if cut.is_sure:
        return "yes", f"{without} the loss rises by {_loss(cut)} (from {usage.loss:.4f}) {on}"
    return "it cannot be told", f"{without} the loss changes by {_change(cut)} {on}, which chance can do"


def _content(usage: Usage) -> list[str]:
    """What of the use is a bias, what differs between images, and what is of the very image."""
    mean, shuffled = usage.mean, usage.shuffled
    if not (mean.is_sure and mean.loss > 0):
        told = f"The average message does as well ({_change(mean)}): what they add is mostly a constant"
        return [f"{told}, the same for every image."]
    told = f"It matters that messages differ between images: with the average one it rises by {_loss(mean)}"
    if shuffled is None:
        return [f"{told}."]
    own = shuffled.is_sure and shuffled.loss > 0
    after = f"by {_loss(shuffled)}" if own else f"only by what chance can do ({_change(shuffled)})"
    return [f"{told}; with another image's, {after}."]


def _each(usage: Usage) -> list[str]:
    """How many matter one by one."""
    alone = [row for row in usage.connections if row.cut.is_sure and row.cut.loss > NEGLIGIBLE]
    of = counted(len(usage.connections), "connection")
    told = [f"Cut one at a time, {len(alone)} of {of} cost a loss that is clear of chance (at 95% each)."]
    if usage.unheard:
        told.append(f"Nobody listens to {len(usage.unheard)} of them: they can be dropped.")
    return told


def effect_kind(effect: Effect) -> Literal["costs", "chance", "helps"]:
    """What cutting does, as the picture of the network colours it: a name in ``dcafy.plan.drawing.EFFECTS``."""
    if not effect.is_sure:
        return "chance"
    return "costs" if effect.loss > 0 else "helps"


def _loss(effect: Effect, sign: int = 1) -> str:
    error = "" if effect.loss_error is None else f" ± {effect.loss_error:.4f}"
    return f"{sign * effect.loss:.4f}{error}"


def _change(effect: Effect) -> str:
    error = "" if effect.loss_error is None else f" ± {effect.loss_error:.4f}"
    return f"{fixed(effect.loss, sign=True)}{error}"


def _points(effect: Effect) -> str:
    error = "" if effect.accuracy_error is None else f" ± {100 * effect.accuracy_error:.2f}"
    return f"{points(effect.accuracy)}{error}"


# --- at what cost -------------------------------------------------------------------------------------


STEADY = 1.3
"""How many times as long as at best a network may take as a rule, for times to be compared."""


def _cost(found: Findings) -> Answer:
    question = "What do they cost?"
    own = found.connected
    if len(found.sides) < 2:
        short = f"{own.complexity.parameters:,} parameters"
        unit, (cost,) = operations(own.complexity.gflops)
        return Answer(question, short, (f"{cost} {unit} an image.",))
    other = found.sides[0]
    more = own.complexity.parameters - other.complexity.parameters
    because = [f"{other.complexity.parameters:,} → {own.complexity.parameters:,} parameters"
               f"{_relative(own.complexity.parameters, other.complexity.parameters)}."]  # fmt: skip
    unit, (fewer, now) = operations(other.complexity.gflops, own.complexity.gflops)
    because.append(f"{fewer} → {now} {unit} an image{_relative(own.complexity.gflops, other.complexity.gflops)}.")
    compared = found.run.comparison
    if compared is not None and compared.pairs:
        pair = compared.pairs[0]
        steps = [compared.arms[arm].step_seconds for arm in (pair.other, pair.one)]
        because.append(f"A training step took {_milliseconds(steps[0])} → {_milliseconds(steps[1])}"
                       f"{_relative(steps[1], steps[0])}.")  # fmt: skip
    images = counted(min(len(found.pictures), 2), "image")
    took = f"{images[0].upper()}{images[1:]} took {_milliseconds(other.seconds)} → {_milliseconds(own.seconds)}"
    unsteady = max(side.unsteady for side in found.sides)
    if unsteady > STEADY:
        because.append(f"{took} just now, which says little: the machine was busy, and as a rule the same network took "
                       f"{unsteady:.1f} times as long as at best.")  # fmt: skip
    else:
        because.append(f"{took}{_relative(own.seconds, other.seconds)} just now.")
    return Answer(question, f"{more:+,} parameters", tuple(because))


def _relative(now: float, before: float) -> str:
    return f" ({fixed(100 * (now / before - 1), 1, sign=True)}%)" if before else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


# --- numbers ------------------------------------------------------------------------------------------


def with_error(effect: Effect | None, *, of_accuracy: bool = False) -> str:
    """A change of the loss, or of the accuracy in points, with its standard error; ``-`` where there is none."""
    if effect is None:
        return "-"
    return _points(effect) if of_accuracy else _change(effect)


def worth(effects: Sequence[Effect]) -> list[float]:
    """The size of each effect on the loss beside the largest one, 0 to 1."""
    most = max((abs(effect.loss) for effect in effects), default=0.0)
    return [abs(effect.loss) / most if most else 0.0 for effect in effects]
