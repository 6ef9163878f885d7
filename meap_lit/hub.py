"""Resolve the name of a model or a tokenizer to a local folder.

A name is a path, or the id of a repository on the Hugging Face Hub: ORG/NAME, or ORG/NAME@REVISION with a branch, a tag
or a commit. huggingface_hub downloads into its own cache, so HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE have their usual meaning. Only weights in safetensors, configurations, tokenizers and chat templates are
downloaded: no code, and nothing that is pickled.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from meap_lit.errors import NO_SPACE, UserError, in_one_line
from meap_lit.files import local_path

TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template*")
CONFIG_FILES = ("config.json", "generation_config.json")
MODEL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json")
_NEVER = ("*/*", "consolidated*")
"""Folders, and the weights that Mistral's repositories hold a second time in another format."""

_HUB_ID = re.compile(r"(?P<org>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDERS = ("checkpoints", "data", "evaluations", "exported", "runs")  # in recipes and documentation
_TIMEOUT = 10.0  # seconds for the first answer; without one, the library would wait without limit

_commits: dict[str, str] = {}
"""Commit of each Hub id that this process has resolved. A branch that moves meanwhile makes no difference."""


def commits() -> dict[str, str]:
    """Return the commit of each Hub id that this process has resolved, for `remember`."""
    return dict(_commits)


def remember(resolved: Mapping[str, str]) -> None:
    """Resolve Hub ids to these commits from now on, as another rank or an earlier run did."""
    _commits.update(resolved)


def is_hub_id(name: str) -> bool:
    """Return whether a name is taken for a Hub id: a local path of this name comes first.

    Anybody can make a repository `checkpoints/Meta-Llama-3-8B`. So where the organization is the name of a folder, here
    or in our recipes, only a name with a revision is an id.
    """
    match = _HUB_ID.fullmatch(name)
    if match is None or name.endswith(".ckpt") or Path(name).exists():
        return False
    return match["revision"] is not None or not (match["org"] in _FOLDERS or Path(match["org"]).is_dir())


def is_pinned(name: str) -> bool:
    """Return whether a name is a Hub id with a commit, which no one can move."""
    return is_hub_id(name) and _COMMIT.fullmatch(name.partition("@")[2]) is not None


def pinned(name: str) -> str:
    """Return a Hub id with the commit that `local_folder` has resolved it to; any other name unchanged."""
    return f"{name.partition('@')[0]}@{_commits[name]}" if name in _commits and is_hub_id(name) else name


def local_folder(name: str | Path, what: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """Return the local path of a name. If it is a Hub id, its files are downloaded first, where they are missing.

    Args:
        name: A local path, or a Hub id.
        what: The kind of thing that the name denotes, for messages.
        files: Patterns of the files to download.

    Raises:
        UserError: If the path or repository does not exist, or cannot be downloaded.
    """
    path, name = local_path(name), str(name)
    if path.exists():
        return path
    if not is_hub_id(name):
        hint = (
            f"; for a repository of that name on the Hugging Face Hub, write {name}@main"
            if is_hub_id(f"{name}@main")
            else ", and is not the id of a repository on the Hugging Face Hub (ORG/NAME or ORG/NAME@REVISION)"
        )
        raise UserError(f"{what} {name} does not exist{hint}")
    try:
        folder = _download(name, what, files)
    except (PermissionError, UserError):
        raise
    except Exception as error:  # the library's HTTP client has its own exceptions
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        raise UserError(f"{what} {name}{_reason(name, error)}") from error
    if not is_pinned(name):
        _commits[name] = folder.name  # the cache keeps each commit in a folder of its name
    if files == MODEL_FILES and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{what} {name}: the repository has no weights in safetensors, and no others are read; name one that has"
        )
    return folder


def download(name: str | None, what: str, files: tuple[str, ...] = MODEL_FILES) -> None:
    """Do what `local_folder` does if the name is a Hub id, and nothing otherwise."""
    if name is not None and is_hub_id(name):
        local_folder(name, what, files)


def check_push(name: str) -> None:
    """Refuse, before any work, a push that cannot succeed.

    Raises:
        UserError: If the name is not an id without a revision, a token is missing, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    match = _HUB_ID.fullmatch(name)
    if match is None or match["revision"] is not None:
        raise UserError(f"--push must name a repository on the Hugging Face Hub as ORG/NAME, got {name!r}")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {name} needs the Hugging Face Hub, and HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise UserError(f"--push {name} needs a token with write access; set HF_TOKEN, or run: hf auth login")


def push(folder: Path, name: str, *, private: bool, ignore: tuple[str, ...]) -> str:
    """Upload a folder as one commit to a repository of a model, which is made if there is none; return its address.

    Args:
        folder: The folder.
        name: The repository, as ORG/NAME.
        private: Make it private; one that is public already is refused.
        ignore: Patterns of files to leave out.

    Raises:
        UserError: If it cannot be uploaded.
    """
    from huggingface_hub import HfApi, constants

    api, failure = HfApi(), f"{folder} is whole, but was not pushed to {name}"
    try:
        url = api.create_repo(name, private=True if private else None, exist_ok=True)
        if private and not api.model_info(name, timeout=_TIMEOUT).private:
            raise UserError(f"{failure}: the repository is public; make it private there, or leave out --private")
        api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=[*ignore], commit_message="Upload an export of meap_lit"
        )
    except (PermissionError, UserError):
        raise
    except Exception as error:  # the library's HTTP client has its own exceptions
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"({type(error).__name__}: {in_one_line(error)})" if status is None else f"with status {status}"
        verb = "cannot be reached" if status is None else "answered"
        hint = "set HF_TOKEN to one that may write there" if status in (401, 403, 404) else "run the command again"
        raise UserError(f"{failure}: {constants.ENDPOINT} {verb} {reason}; {hint}") from error
    return str(url)


def _download(name: str, what: str, files: tuple[str, ...]) -> Path:
    """Return the folder of a repository in the cache, with the newest commit of its revision if the Hub answers.

    Raises:
        UserError: If the Hub does not answer, and the cache does not have what is needed.
    """
    import huggingface_hub  # takes half a second
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, revision = pinned(name).partition("@")

    def snapshot(*, online: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            local_files_only=not online,
            allow_patterns=[*files],
            ignore_patterns=[*_NEVER],
        )
        return Path(folder)

    try:
        cached = snapshot(online=False)
    except LocalEntryNotFoundError:  # also if only some of the files are there
        cached = None
    if cached is not None and _COMMIT.fullmatch(revision):
        return cached
    try:
        newest = huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=_TIMEOUT).sha
    except Exception as error:  # the library's HTTP client has its own exceptions
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise
        if cached is not None:
            return cached
        is_offline = isinstance(error, OfflineModeIsEnabled)
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {in_one_line(error)})"
        raise UserError(
            f"{what} {name} does not exist here, the cache {constants.HF_HUB_CACHE} does not hold all of it, and "
            f"{'HF_HUB_OFFLINE is set' if is_offline else reason}; name a local folder, or download it where there is "
            f"a connection"
        ) from error
    return cached if cached is not None and cached.name == newest else snapshot(online=True)


_REASONS = {
    "HFValidationError": " does not exist, and is not the id of a repository on the Hugging Face Hub ({error})",
    "GatedRepoError": (
        " is gated: accept its conditions at {hub}/{repository}, and set HF_TOKEN to a token of that account"
    ),
    "RepositoryNotFoundError": (
        " does not exist here, and {hub} has no such repository, or only for another HF_TOKEN; check the name and the "
        "token"
    ),
    "RevisionNotFoundError": (
        ": the repository has no revision {revision}; name a branch, a tag or a commit of 40 digits"
    ),
    "HfHubHTTPError": ": {hub} answered with status {status}; {hint}",
    "Exception": ": the download from {hub} broke off ({error}); run the command again",
}
"""What follows the name of a repository in a message, by the class of the library's error or a base of it."""


def _reason(name: str, error: Exception) -> str:
    from huggingface_hub import constants

    repository, _, revision = name.partition("@")
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = next(_REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REASONS)
    return text.format(
        hub=constants.ENDPOINT,
        repository=repository,
        revision=revision,
        status=status,
        hint="check HF_TOKEN" if status in (401, 403) else "try again later",
        error=f"{type(error).__name__}: {in_one_line(error)}",
    )
