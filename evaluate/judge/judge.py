"""One judging from options to report: check everything cheap, ask what is missing, summarise, write."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_json, write_text
from dpkd.core.outputs import LOCK, lock_directory
from dpkd.core.plotting import require_matplotlib
from dpkd.core.progress import Progress, say
from dpkd.evaluate.judge.client import JudgeClient, read_key
from dpkd.evaluate.judge.markdown import judge_markdown
from dpkd.evaluate.judge.plot import plot_judge
from dpkd.evaluate.judge.questions import Form, read_prompt
from dpkd.evaluate.judge.report import FORMAT_VERSION, build_judge_report, write_per_verdict
from dpkd.evaluate.judge.rows import Answers, JudgedSet, Question, choose, make_questions, read_answers
from dpkd.evaluate.judge.tokens import estimate_tokens
from dpkd.evaluate.judge.verdicts import Answered, Reply, Verdicts
from dpkd.evaluate.options.judge import FREE_OPTIONS, JudgeConfig
from dpkd.evaluate.views.output import check_options, is_complete, save_options
from dpkd.teacher_cache.engines.http import RequestRefusedError

_ADVICE = "Choose another --out (--verdicts reuses the verdicts of this one); nothing was overwritten"
# this many refusals without a single reply cannot be due to the questions
_MOST_REFUSALS = 5


class _Plan:
    """Everything that a judging needs before the first question."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        pointwise: Form = "scores" if config.grade_reference else "score"
        self.prompt = read_prompt(config.prompt, "verdict" if config.mode == "pairwise" else pointwise)
        self.answers: Answers = read_answers(config)
        self.sets: list[JudgedSet] = choose(self.answers, config)
        self.questions: list[Question] = list(make_questions(self.sets, config, self.prompt))
        # verdicts of different judges are never mixed; prompts are part of the questions' keys
        reask = self.prompt.reask if config.reask else None
        judge = {"url": config.judge_url, "body": config.request_body(), "reask": reask}
        self.verdicts = Verdicts(config.verdicts_path(), judge)

    def missing(self, answered: Mapping[str, Answered]) -> list[Question]:
        """The questions without an answer, each text once."""
        return list({q.key: q for q in self.questions if q.key not in answered}.values())


def judge(config: JudgeConfig) -> Path:
    """Have the answers of `config` judged; returns the path of `judge.json`.

    Each verdict is saved as it arrives. After a crash, call it again: it asks only what is missing. If the report is
    complete it does nothing. Raises `UserError` for options that cannot be used, before the first question, and if the
    judge stops answering.
    """
    require_matplotlib()
    key = read_key(config)
    plan = _Plan(config)
    # what the report depends on, besides the verdicts
    identity = {
        "format_version": FORMAT_VERSION,
        "settings": config.model_dump(mode="json", exclude=set(FREE_OPTIONS)),
        "answers": plan.answers.identity,
        "prompt": {"sha256": plan.prompt.sha256},
    }
    path = config.out / "judge.json"
    check_options(config, config.out, FREE_OPTIONS, "judge.json", _ADVICE)
    if is_complete(path, identity, _ADVICE):
        say(f"the judging in {config.out} is complete already")
        return path
    with lock_directory(plan.verdicts.path.parent, LOCK):
        answered = plan.verdicts.read()
        save_options(config, config.out)
        _ask(plan, answered, key)
    report = build_judge_report(config, plan.prompt, identity, plan.answers, plan.sets, plan.questions, answered)
    write_per_verdict(config.out / "per_verdict.parquet", plan.questions, answered)
    write_text(config.out / "judge.md", judge_markdown(report))
    plot_judge(report, config.out / "judge")
    write_json(path, report)
    return path


def estimate(config: JudgeConfig) -> dict[str, Any]:
    """How many questions `judge` would ask now, and about how many tokens they take; asks and writes nothing."""
    plan = _Plan(config)
    answered = plan.verdicts.read()
    return estimate_tokens(config, plan.questions, plan.missing(answered), answered)


def _ask(plan: _Plan, answered: dict[str, Answered], key: str) -> None:
    """Ask every missing question; each answer goes to the file and to `answered`."""
    missing = plan.missing(answered)
    num_total = len({question.key for question in plan.questions})
    if not missing:
        say(f"all {num_total} verdicts exist already")
        return
    say(f"asking {plan.config.judge_model} at {plan.config.judge_url}: {len(missing)} of {num_total} questions")
    with Progress("judging", num_total, "verdicts", done=num_total - len(missing)) as progress:
        _run(_Asking(plan, answered, progress).run(missing, key))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, except that SIGTERM cancels `work` as Ctrl-C does: a handler that raises inside a task, in the
    middle of a connection, would print the tracebacks of other tasks.
    """
    is_main, before, terminated = threading.current_thread() is threading.main_thread(), None, False

    async def cancellable() -> None:
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        if is_main:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        await work

    if is_main:
        before = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(cancellable())
    except asyncio.CancelledError:
        if not terminated:
            raise
        raise KeyboardInterrupt from None
    finally:
        if is_main:  # the loop leaves the default handler behind
            signal.signal(signal.SIGTERM, before)


class _Asking:
    """Asks questions, up to `concurrency` at once."""

    def __init__(self, plan: _Plan, answered: dict[str, Answered], progress: Progress) -> None:
        self._plan, self._answered, self._progress = plan, answered, progress
        self._refused: list[Answered] = []  # saved only when the judge has replied to any question
        keys = {question.key for question in plan.questions}
        self._replied = any(found.replies for name, found in answered.items() if name in keys)
        self._num_asked = self._num_unread = 0

    async def run(self, questions: Sequence[Question], key: str) -> None:
        """Return when all are answered; the first error stops all of them."""
        waiting = iter(questions)
        asyncio.get_running_loop().set_exception_handler(_report_unless_interrupted)
        async with JudgeClient(self._plan.config, key) as client:
            workers = [
                asyncio.create_task(self._work(client, waiting))
                for _ in range(min(self._plan.config.concurrency, len(questions)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self._refused:
            raise self._all_refused()

    async def _work(self, client: JudgeClient, waiting: Iterator[Question]) -> None:
        for question in waiting:
            try:
                found = Answered(question.key, await self._replies(client, question))
            except RequestRefusedError as refusal:
                found = Answered(question.key, refused=str(refusal))
            self._take(found)

    async def _replies(self, client: JudgeClient, question: Question) -> tuple[Reply, ...]:
        """The reply, and a second one if the first cannot be read and `--reask` is given."""
        messages = [{"role": "user", "content": question.text()}]
        first = await client.ask(messages)
        if not self._plan.config.reask or Answered("", (first,)).parsed(question.prompt.form) is not None:
            return (first,)
        messages += [
            {"role": "assistant", "content": first.content or "(nothing)"},
            {"role": "user", "content": question.prompt.reask},
        ]
        try:
            return first, await client.ask(messages)
        except RequestRefusedError:
            return (first,)  # perhaps too long by now: the reply stays unparsable

    def _take(self, found: Answered) -> None:
        if found.refused is not None and not self._replied:
            self._refused.append(found)
            if len(self._refused) >= _MOST_REFUSALS:
                raise self._all_refused()
            return
        self._replied = True
        for one in (*self._refused, found):
            self._plan.verdicts.append(one)
            self._answered[one.question] = one
            self._num_asked += 1
            self._num_unread += one.parsed(self._plan.prompt.form) is None
            self._progress.advance(unparsable_or_refused=f"{self._num_unread / self._num_asked:.1%}")
        self._refused.clear()

    def _all_refused(self) -> UserError:
        return UserError(
            f"the judge refused all of the first {len(self._refused)} questions",
            found=self._refused[0].refused,
            where=self._plan.config.judge_url,
            advice="See its message; --extra-body NAME=null removes a field from the requests",
        )


def _report_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An interrupt is raised in the running task and stops all of them; it is not reported as an error of that task."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)
