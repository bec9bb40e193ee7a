"""Serve a model over HTTP with OpenAI's interface, with sessions whose memory lasts. Needs `pip install -e '.[serve]'`.

MODEL is a run directory (its newest checkpoint), RUN@STEP, a checkpoint or an exported directory.

Examples:

    hope serve runs/NAME                                     http://127.0.0.1:8000/v1
    hope serve DIR --session-dir sessions                    sessions that do not fit in memory go to disk, and outlive the server
    hope serve DIR --host 0.0.0.0 --token-file tokens        for others: one token a line, file mode 600
    hope serve DIR --dry-run                                 load and check everything, print the settings, start nothing
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.models import add_model_argument, prepare_process

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument("--name", help="what clients call the model (default: the directory's name)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that other machines reach needs --token-file (default 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default 8000)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="tokens that clients send as Bearer, one a line"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one (not run there yet), else cpu")
    batch = parser.add_argument_group("limits")
    batch.add_argument("--max-batch", type=int, default=32, metavar="N", help="streams at once (default 32)")
    batch.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="streams that may wait, else 429 (default 256)"
    )
    batch.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="most tokens drawn for a request (default 4096)"
    )
    batch.add_argument("--max-body-mib", type=float, default=16, metavar="N", help="longest request (default 16)")
    batch.add_argument(
        "--max-client-requests", type=int, default=64, metavar="N", help="requests of one token at once (default 64)"
    )
    batch.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for a request (default 600)")
    sessions = parser.add_argument_group("sessions")
    sessions.add_argument("--session-dir", type=Path, metavar="DIR", help="where states go that memory does not hold")
    sessions.add_argument(
        "--session-mib", type=float, default=1024, metavar="N", help="states in memory (default 1024)"
    )
    sessions.add_argument(
        "--session-disk-mib", type=float, default=16384, metavar="N", help="states on disk (default 16384)"
    )
    sessions.add_argument(
        "--session-hours",
        type=float,
        default=24,
        metavar="H",
        help="hours without use after which a session expires (default 24)",
    )
    sessions.add_argument(
        "--max-client-sessions", type=int, default=1000, metavar="N", help="sessions of one token (default 1000)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="load the model, print the settings as JSON, start nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; then running requests end, and sessions are kept."""
    _check(args)
    prepare_process()
    try:
        import uvicorn

        from hope_megatron.serve.app import build_app
        from hope_megatron.serve.service import Service
    except ModuleNotFoundError as error:
        raise ModelReferenceError(
            f"hope serve needs the package {error.name}; install it with pip install -e '.[serve]'"
        ) from None
    import torch

    from hope_megatron.library import Run

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    service = Service(Run(args.model, tokenizer=args.tokenizer, device=device), settings_of(args))
    if args.dry_run:
        service.engine.close()
        print(json.dumps(_shown(service.settings, args, device), indent=2))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has shut down: that is no failure
    logging.getLogger("uvicorn.access").disabled = True  # session names are in the paths
    print(f"serving {service.settings.model_name} at http://{args.host}:{args.port}/v1 (Ctrl-C ends it)", flush=True)
    uvicorn.run(
        build_app(service),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    return 0


def settings_of(args: argparse.Namespace) -> Any:
    """The server's settings from the arguments."""
    from hope_megatron.serve.settings import Settings, read_tokens

    mib = lambda number: int(number * (1 << 20))  # noqa: E731
    return Settings(
        model_name=args.name or Path(args.model.partition("@")[0]).resolve().name,
        tokens=read_tokens(args.token_file) if args.token_file else frozenset(),
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        max_tokens=args.max_tokens,
        max_body_bytes=mib(args.max_body_mib),
        max_client_requests=args.max_client_requests,
        request_timeout_s=args.timeout,
        session_dir=args.session_dir,
        session_bytes=mib(args.session_mib),
        session_disk_bytes=mib(args.session_disk_mib),
        session_idle_s=args.session_hours * 3600,
        max_client_sessions=args.max_client_sessions,
    )


def _check(args: argparse.Namespace) -> None:
    if args.host not in LOOPBACK and args.token_file is None:
        raise ModelReferenceError(
            f"--host {args.host} lets other machines in; give --token-file FILE, or leave out --host and use a tunnel"
        )
    if not 0 < args.port < 65536:
        raise ModelReferenceError(f"--port {args.port} is no port; give 1 to 65535")
    for name in ("max_batch", "max_waiting", "max_tokens", "max_body_mib", "max_client_requests", "timeout", "session_mib",
                 "session_disk_mib", "session_hours", "max_client_sessions"):  # fmt: skip
        if not getattr(args, name) > 0:
            raise ModelReferenceError(f"--{name.replace('_', '-')} {getattr(args, name)} must be positive")


def _shown(settings: Any, args: argparse.Namespace, device: str) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    return {**values, "tokens": len(settings.tokens), "device": device, "host": args.host, "port": args.port}
