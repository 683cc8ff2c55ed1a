"""What all verbs share: consoles, options, loading a configuration, and errors as people should see them."""

from __future__ import annotations

import atexit
import errno
import os
import pwd
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from mahalo_ray.config import ConfigError, RunConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.seed_blocks import check_domain
from mahalo_ray.pipeline.stages import Manifest, Pipeline, RunInterrupted, sigterm_raises

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override one key; may be given many times."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_RIGHTS = "Give the rights to write there, or name another folder"
_WHAT_TO_DO = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room and run the same command again: it goes on"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "Name a folder that no file is in the way of"
    ),
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Check the path",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files (`ulimit -n 65536`)"),
}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def open_session(config: RunConfig, *, serves: bool = False) -> Iterator[None]:
    """Ray, as this configuration wants it, for stages or for an endpoint (`serves`). The endpoint's API key
    stays out of the environment of what Ray starts: replicas get a digest of it."""
    from mahalo_ray.pipeline.cluster import ray_session

    if config.data is not None:  # trained on, not served
        session = ray_session(config.cluster, rollouts=False)
    else:
        session = ray_session(config.cluster, config.serve.cpus(), serves=serves)
    key = os.environ.pop(config.serve.api_key_env or "", None)
    try:
        with session:
            yield
    finally:
        if key is not None and config.serve.api_key_env is not None:
            os.environ[config.serve.api_key_env] = key


def load(file: Path, overrides: list[str] | None, *, any_seeds: bool = False) -> RunConfig:
    """The configuration, checked for what its domain can do. ConfigError for several `seeds`, unless the verb
    takes `any_seeds`."""
    config = load_config(file, overrides)
    if config.seeds and not any_seeds:
        folder = storage.join(config.output, f"seed_{config.seeds[0]}")
        raise ConfigError(
            "'seeds' is for the verbs run and compare. For the run of one seed: --set 'seeds=[]' "
            f"--set seed={config.seeds[0]} --set output={folder}"
        )
    if config.data is None:
        check_domain(config)
    return config


def execute(
    pipeline: Pipeline[RunConfig], config: RunConfig, targets: tuple[str, ...] | None
) -> dict[str, Manifest]:
    """Run stages of any pipeline with a Ray session of this configuration."""
    return pipeline.run(config, targets, session=lambda: open_session(config), progress=RunProgress(out))


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Do the work; what the user can mend becomes one clear message and exit code 2."""
    try:
        with sigterm_raises():
            work()
    except RunInterrupted as stop:
        err.print(escape(str(stop)))
        _leave(stop.exit_code)
    except KeyboardInterrupt:
        err.print("Stopped.")
        _leave(130)
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:
            raise
        err.print("Stopped.")
        _leave(128 + signal.SIGTERM)
    except StageError as error:
        if debug:
            traceback.print_exception(error)
        err.print(f"[bold red]failed:[/] {escape(str(error))}")
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno is None and str(error):  # a library's own message, of a hub for example
            _end_with(error, str(error), debug)
        if error.errno not in _WHAT_TO_DO:
            raise
        _end_with(error, _explain_os_error(error), debug)
    except ValueError as error:
        _end_with(error, _message(error), debug)
    except _errors_of_s3() as error:
        advice = "See that the address, AWS_ENDPOINT_URL and the keys (AWS_ACCESS_KEY_ID and so on) are right"
        _end_with(error, f"the object store cannot be used: {error}. {advice}", debug)


def _errors_of_s3() -> tuple[type[Exception], ...]:
    """What S3's client raises that is no OSError (no keys, no such host); it is imported where it is used."""
    client = sys.modules.get("botocore.exceptions")
    return () if client is None else (client.BotoCoreError,)


def _end_with(error: Exception, message: str, debug: bool) -> NoReturn:
    """One message, and exit code 2."""
    if debug:
        traceback.print_exception(error)
    notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
    err.print(f"[bold red]error:[/] {escape(message)}{escape(notes)}")
    raise SystemExit(2) from None


def provide_home() -> None:
    """Libraries keep caches at home and ask for the user's name: where there is none, as in containers with
    any user id, they get a temporary home and a name."""
    home, uid = os.path.expanduser("~"), os.getuid()
    if not any(name in os.environ for name in ("LOGNAME", "USER")):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            os.environ["USER"] = f"uid{uid}"
    if os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return
    os.environ["HOME"] = tempfile.mkdtemp(prefix="mahalo-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    err.print(f"The home folder '{home}' cannot be written: caches are kept in {os.environ['HOME']} for now")


def _explain_os_error(error: OSError) -> str:
    """What the system refused, where, and what to do about it; errors of no known kind are defects."""
    where = f": '{error.filename}'" if error.filename else ""
    return f"{error.strerror}{where}. {_WHAT_TO_DO[error.errno or 0]}"


def say(message: str) -> None:
    """Print one line as it is, however long."""
    out.print(message, markup=False, soft_wrap=True)


def _message(error: ValueError) -> str:
    """Without the remote traceback that Ray adds to an error from a worker."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, ValueError) else error)


def _leave(code: int) -> NoReturn:
    """End at once: a stage's thread may still be computing, and nothing it does counts any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
