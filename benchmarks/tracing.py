"""What does tracing cost? A traced render against the plain one that transformers would run, in one run.

python benchmarks/tracing.py [--templates DIR_OF_JINJA_FILES]
Templates: those of the tests, or those of a directory. Conversations: two and six messages of some 300 characters.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.sandbox import make_environment
from dft_prep.template.trace import mark_messages

DATE = datetime.date(2026, 1, 31)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def conversation(turns: int) -> list[dict[str, str]]:
    pair = [{"role": "user", "content": "What is it? " * 25}, {"role": "assistant", "content": "It is that. " * 25}]
    return [dict(message) for _ in range(turns) for message in pair]


def plain_render(source: str, messages: list[dict[str, str]]) -> Callable[[], str]:
    """As transformers compiles and renders a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[*make_environment(DATE).extensions, jinja2.ext.loopcontrols]
    )
    ours = make_environment(DATE)
    environment.filters["tojson"] = ours.filters["tojson"]
    environment.globals.update({name: ours.globals[name] for name in ("raise_exception", "strftime_now")})
    template = environment.from_string(source)
    return lambda: template.render(messages=messages, tools=None, documents=None, add_generation_prompt=False, **NAMED)


def microseconds(work: Callable[[], object], seconds: float = 0.02) -> float:
    """Of one call: the mean over some twenty milliseconds."""
    calls = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(20):
            work()
        calls += 20
    return (time.perf_counter() - started) / calls * 1e6


def compare(plain: Callable[[], object], traced: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Each one's best of several rounds, taken in turn so that both meet the same machine."""
    pairs = [(microseconds(plain), microseconds(traced)) for _ in range(rounds)]
    return min(first for first, _ in pairs), min(second for _, second in pairs)


def sources(directory: Path | None) -> dict[str, str]:
    if directory is not None:
        return {path.stem: path.read_text("utf-8") for path in sorted(directory.rglob("*.jinja"))}
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    return dict(tiny.TEMPLATES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path)
    ratios: list[float] = []
    for name, source in sources(parser.parse_args().templates).items():
        for turns in (1, 3):
            messages = conversation(turns)
            marked = mark_messages(messages)
            template = ChatTemplate(source, NAMED, DATE)
            try:
                template.trace(marked)
            except TemplateRefusal as error:
                print(f"{name:24} {2 * turns} messages: refuses it ({error})")
                continue
            plain, traced = compare(plain_render(source, messages), lambda t=template, m=marked: t.trace(m))
            ratios.append(traced / plain)
            print(f"{name:24} {2 * turns} messages: plain {plain:6.1f} us, traced {traced:6.1f} us, {ratios[-1]:.2f} x")
    print(f"median {statistics.median(ratios):.2f} x, highest {max(ratios):.2f} x")


if __name__ == "__main__":
    main()
