"""Sample text from a model, in constant memory however long the text.

Examples:

    hope generate runs/NAME --prompt "def main("            one continuation, printed as it is drawn
    hope generate runs/NAME --prompt A --prompt B -n 4      four continuations of each prompt
    hope generate runs/NAME --file BOOK --prompt Q          read a file, then the question after it
    hope generate runs/NAME --file BOOK --state book.st     read a file and keep the state
    hope generate runs/NAME --state book.st --prompt Q      continue from there, as often as you like
    hope generate runs/NAME --learn --state me.st           it goes on learning from what is read and written
    hope generate runs/NAME --learn --learn-rest --state me.st   the last tokens too, which fill no chunk
    hope generate runs/NAME                                 interactive: each line is read, then continued
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.learning import add_learning_arguments, prepare_learning
from hope_megatron.cli.models import add_model_argument, prepare_process
from hope_megatron.cli.output_files import check_writable
from hope_megatron.convert.open_model import OpenModel, open_model

if TYPE_CHECKING:
    from hope_megatron.generation.sampling import SamplingOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="read this file first, or alone (- is standard input)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="tokens of each continuation at most (default 200)"
    )
    parser.add_argument(
        "-n", "--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt, drawn as a batch"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="keep the likeliest tokens that hold P (default 0.95)"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: none (default)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed draws the same text (default 0)"
    )
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="continue from this state if it exists, and save it back"
    )
    add_learning_arguments(parser)
    parser.add_argument(
        "--learn-rest",
        action="store_true",
        help="before --state is saved, also learn from the last tokens, which fill no chunk; the clocks then begin anew",
    )
    parser.add_argument("--ignore-end", action="store_true", help="go on after the end-of-document token")


def run(args: argparse.Namespace) -> int:
    """Generate."""
    prepare_process()
    from hope_megatron.generation.sampling import SamplingOptions

    if args.max_new_tokens < 0 or args.num_samples < 1:
        raise ModelReferenceError("--max-new-tokens must be at least 0 and --num-samples at least 1")
    options = SamplingOptions(args.repetition_penalty, args.temperature, args.top_k, args.top_p)
    check_writable(args.state)
    prompts = _prompts(args)
    if args.state and (args.num_samples > 1 or len(prompts or []) > 1):
        raise ModelReferenceError("--state holds one stream: give one prompt and one sample with it")
    if args.learn_rest and not args.state:
        raise ModelReferenceError("--learn-rest changes what --state keeps; give --state FILE with it")
    session = _Session(open_model(args.model, args.tokenizer), options, args)
    if prompts is None:
        session.interactive()
    elif args.num_samples == 1 and len(prompts) == 1:
        session.stream(prompts[0])
    else:
        for prompt in prompts:
            session.batch(prompt)
    session.save()
    return 0


def _prompts(args: argparse.Namespace) -> list[str] | None:
    """Prompts in order, each after the file if there is one; None asks for them interactively."""
    if args.file is None and args.prompt:
        return args.prompt
    if args.file is None and sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read() if args.file in (None, Path("-")) else args.file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ModelReferenceError(f"cannot read the prompt {args.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelReferenceError(
            f"the prompt {args.file or 'on standard input'} is not UTF-8 text: {error}"
        ) from error
    return [text + prompt for prompt in args.prompt or [""]]


class _Session:
    """One model, one stream that goes on (or a fresh batch per prompt), one random generator."""

    def __init__(self, opened: OpenModel, options: SamplingOptions, args: argparse.Namespace) -> None:
        import torch

        from hope_megatron.generation.complete import new_document
        from hope_megatron.generation.decoder import Decoder
        from hope_megatron.generation.learning import LearningDecoder
        from hope_megatron.generation.state_file import load_state

        self.opened, self.options, self.args = opened, options, args
        self.rng = torch.Generator(next(opened.model.parameters()).device).manual_seed(args.seed)
        self.end_id = -1 if args.ignore_end else opened.tokenizer.eos_id
        self.kind = LearningDecoder if prepare_learning(args, opened.model) else Decoder
        if args.learn_rest and self.kind is Decoder:
            raise ModelReferenceError("--learn-rest: the model does not learn here; give it clocks with --learn")
        if args.state and args.state.exists():
            self.decoder = load_state(args.state, opened.model, self.kind)
        else:
            self.decoder = new_document(opened.model, opened.tokenizer, kind=self.kind)

    def stream(self, prompt: str, echo: bool = True) -> None:
        """Continue the session's stream, printing text as soon as it is certain."""
        import torch

        from hope_megatron.generation.text import TextStream

        self.decoder.append(torch.from_numpy(self.opened.tokenizer.encode(prompt)).unsqueeze(0))
        text = TextStream(self.opened.tokenizer)
        _write(prompt if echo else "")
        for token in self.decoder.generate(self.args.max_new_tokens, self.options, self.rng):
            if int(token) == self.end_id:
                break
            _write(text.push(int(token)))
        _write(text.flush() + "\n")

    def batch(self, prompt: str) -> None:
        """Continue one prompt several times at once."""
        from hope_megatron.generation.complete import complete

        texts = complete(
            self.opened.model,
            self.opened.tokenizer,
            prompt,
            num_samples=self.args.num_samples,
            max_new_tokens=self.args.max_new_tokens,
            options=self.options,
            rng=self.rng,
            end_id=self.end_id,
            kind=self.kind,
        )
        for number, text in enumerate(texts, start=1):
            _write(f"--- {number} of {len(texts)}\n{prompt}{text}\n")

    def interactive(self) -> None:
        """Read a line, continue it, keep the state."""
        print("each line is added to the text and continued; Ctrl-C stops a continuation, Ctrl-D ends", file=sys.stderr)
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            try:
                self.stream(line, echo=False)
            except KeyboardInterrupt:
                print(file=sys.stderr)  # stops this continuation; the text so far stays in the state

    def save(self) -> None:
        """Keep the stream in the state file, if there is to be one."""
        from hope_megatron.generation.learning import LearningDecoder
        from hope_megatron.generation.state_file import save_state

        if self.args.state:
            self.decoder.read_ahead()
            if self.args.learn_rest and isinstance(self.decoder, LearningDecoder):
                self.decoder.finish()
            save_state(self.args.state, self.decoder)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
