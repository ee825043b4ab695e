"""A finished run that is made longer: `--resume` with more `--epochs`.

Its rows and its optimizer's state stay, and the learning rate goes on as it would in a run of the
new length: it rises from 0 to where that run's cosine is by then. So it is no run of the new length
from the start, and its fingerprint has the lengths that it had before.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.common.files import entry, is_there, read_json
from experiments.training.checkpoint import check_fingerprint, is_of_run
from experiments.training.folder import Fingerprint, read_fingerprint, read_result

EARLIER = "earlier_epochs"


def continued(folder: Path, current: Fingerprint, *, resume: bool) -> Fingerprint:
    """The fingerprint with which a run goes on in a folder that has one already.

    Args:
        folder: of the run.
        current: what the configuration asks for.
        resume: whether it asks for a run to go on with.

    Raises:
        UserError: the folder's run is another one, or cannot be made longer.
    """
    saved, where = read_fingerprint(folder), folder / "config.json"
    earlier = entry({EARLIER: [], **saved}, EARLIER, list, where)
    if not all(type(epochs) is int and epochs > 0 for epochs in earlier):
        raise UserError(f"{where} is damaged: its {EARLIER!r} is {earlier!r:.200}")
    had, wanted = saved.get("epochs"), current["epochs"]
    if resume and type(had) is int and had < wanted:
        check_fingerprint({**saved, "epochs": wanted}, {**current, EARLIER: earlier}, folder)
        _check_end(folder, saved, current)
        return {**current, EARLIER: [*earlier, had]}
    check_fingerprint(saved, {**current, EARLIER: earlier}, folder)
    return {**current, EARLIER: earlier} if earlier else current


def _check_end(folder: Path, saved: Fingerprint, current: Fingerprint) -> None:
    had, wanted = saved["epochs"], current["epochs"]
    result = read_result(folder)
    if result is None or not is_of_run(result["run"], saved):
        raise UserError(
            f"{folder} is of another run: its epochs is {had}, not {wanted}; once it has ended "
            f"with --resume --epochs {had}, it can be made longer"
        )
    if current["anneal"] != "none":
        raise UserError(
            f"{folder} cannot be made longer: its stages of --anneal {current['anneal']} are over. "
            "--start begins a new run with its parameters"
        )


def lengths_before(fingerprint: Fingerprint) -> list[Fingerprint]:
    """The fingerprints of the same run before it was made longer, the last one first."""
    lengths = fingerprint.get(EARLIER, [])
    return [
        {**fingerprint, "epochs": epochs, EARLIER: lengths[:place]}
        for place, epochs in reversed(list(enumerate(lengths)))
    ]


def is_shorter(saved: Any, fingerprint: Fingerprint) -> bool:
    """Whether `saved` is of the same run before it was made longer."""
    return any(is_of_run(saved, one) for one in lengths_before(fingerprint))


def record(folder: Path, fingerprint: Fingerprint, command: str) -> dict[str, Any]:
    """What config.json says of a run: when it goes on with another length, its first commands too.

    Raises:
        UserError: config.json is damaged.
    """
    path = folder / "config.json"
    before = read_json(path) if is_there(path) else {}
    commands = entry({"earlier_commands": [], **before}, "earlier_commands", list, path)
    if "command" in before:
        commands = [*commands, before["command"]]
    kept = {"earlier_commands": commands} if commands else {}
    return {"run": fingerprint, "command": command, **kept}


def say(folder: Path, fingerprint: Fingerprint, rate: float) -> None:
    """Tells what making a run longer means for its rows and its learning rate."""
    had, wanted = fingerprint[EARLIER][-1], fingerprint["epochs"]
    print(
        f"{folder} is made longer, from {had} to {wanted} epochs: it keeps its rows, and the "
        f"learning rate goes on from {rate:.3g}, as in a run of {wanted} epochs",
        file=sys.stderr,
    )


def note(fingerprint: Fingerprint) -> str:
    """What a reader of the result should know, "" of a run that was never made longer."""
    lengths = fingerprint.get(EARLIER, [])
    return f"made longer after {', '.join(map(str, lengths))} epochs" if lengths else ""
