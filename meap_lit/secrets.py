"""Keys, tokens and passwords: a recipe may hold them, but this package writes none of them.

A recipe that is written has a reference in place of a secret, `${oc.env:AWS_SECRET_ACCESS_KEY}`. The reader of the file
sees where the secret belongs, and a run that is resumed from it reads the secret from the environment.
"""

import argparse
import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_SHORTEST = 8
"""Characters of a secret that is looked for in other texts; a shorter one may be there by chance."""

HIDDEN = "***"
"""Replaces a secret in a message or a command."""

_ANYWHERE = {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "apikey", "bearer"}
_ANYWHERE |= {"credential", "credentials", "accesskey", "accesstoken", "accountkey", "authtoken", "secretkey"}
_LAST = {"auth", "authorization", "cookie", "dsn", "jwt", "pass", "pat", "sas", "sig", "signature"}
_KEYS = {"access", "account", "api", "auth", "client", "customer", "encryption", "private", "shared", "signing", "ssh"}
_KEYS |= {"functions", "host", "master", "storage", "subscription"}
_TOKENS_OF_TEXT = {"added", "begin", "bos", "cls", "end", "eos", "every", "first", "image", "last", "mask", "new"}
_TOKENS_OF_TEXT |= {"next", "pad", "sep", "special", "start", "stop", "text", "unk"}
_BEFORE_TOKEN = tuple(f"{word} " for word in _TOKENS_OF_TEXT)
_PLACES = {"dir", "env", "file", "folder", "name", "path", "url", "var", "variable"}
"""The last word of a name that says where a secret is kept."""

# a password may hold "@"; a name without one is a token in http, but a container or a bucket elsewhere
_LOGIN = re.compile(
    r"""(?<=://)[^/\s?\#"':]*:[^/\s?\#"']+(?=@)|(?<=http://)[^/\s?\#"']+(?=@)|(?<=https://)[^/\s?\#"']+(?=@)"""
)
_VALUE = re.compile(r"""([A-Za-z][\w.-]*)(["']?\s*[:=]\s*)("[^"\n]*"|'[^'\n]*'|[^\s,;&"'{}\[\]]+)""")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)
_GOT = re.compile(r"""([A-Za-z][\w.-]*)(["']? must be .*, got )(.+)""")
_QUERY = re.compile(r"""([?&])([\w-]+)=[^&\s"']+""")
_BEARER = re.compile(r"(?<=\bBearer )\S+")


def is_secret(name: str) -> bool:
    """Return whether an option of this name holds a secret.

    Example: `aws_session_token`, `api_key` and `clientSecret` do; `tokenizer`, `max_tokens`, `eos_token`,
    `mask_token_id` and `key_variable` do not.
    """
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):  # a path, such as that of a dataset
        return False
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    if words[-1] in _PLACES:
        return False
    before = words[-2] if len(words) > 1 else ""
    return (
        not _ANYWHERE.isdisjoint(words)
        or words[-1] in _LAST
        or words[-2:] == ["connection", "string"]
        or (words[-1] in ("token", "tokens") and _is_token_of_access(words[-1], before))
        or any(word in ("key", "keys") and earlier in _KEYS for earlier, word in pairwise(words))
        or any(word == "header" and earlier in _LAST for earlier, word in pairwise(words))
    )


def _is_token_of_access(word: str, before: str) -> bool:
    if word == "tokens":  # usually a number of tokens
        return before in ("access", "api", "auth", "session")
    return before not in _TOKENS_OF_TEXT


def with_variables(text: str) -> str:
    """Return a text of a recipe with a reference in place of each secret that a variable of the environment holds.

    So a recipe that reads a token by `${oc.env:MY_TOKEN}` is written down with the same reference, whatever the name of
    its key.
    """
    for name, value in os.environ.items():
        if name != "PWD" and len(value) >= _SHORTEST and is_secret(name):  # the working directory
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def without_secrets(content: Any, where: tuple[str, ...] = ()) -> Any:
    """Return a copy of a recipe, or of a part of one, with a reference to the environment in place of each secret.

    Args:
        content: Namespaces, mappings and lists of values.
        where: Keys above it.
    """
    if isinstance(content, argparse.Namespace):
        namespace = copy.copy(content)
        for name, value in vars(content).items():
            setattr(namespace, name, without_secrets(value, (*where, name)))
        return namespace
    if isinstance(content, Mapping):
        return {name: without_secrets(value, (*where, str(name))) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_secrets(value, (*where, str(number))) for number, value in enumerate(content)]
    is_value = isinstance(content, str | int) and not isinstance(content, bool)
    if is_value and any(map(is_secret, where)) and not str(content).startswith("${"):
        return _reference(where)
    if isinstance(content, str):
        shown = _LOGIN.sub(lambda _: _reference((*where, "login")), content)
        shown = _BEARER.sub(lambda _: _reference((*where, "bearer")), shown)
        return _in_queries(shown, lambda name: _reference((*where, name))) if "://" in shown else shown
    return content


def _reference(where: Sequence[str]) -> str:
    """Return a reference that reads the secret at a key from the environment.

    The variable has the name that a service knows, such as AWS_SECRET_ACCESS_KEY, if the key has that name.
    """
    name = where[-1] if where[-1].startswith("aws_") else "_".join(word for word in where if word != "init_args")
    return f"${{oc.env:{re.sub(r'[^A-Z0-9]', '_', name.upper())}}}"


def _in_queries(text: str, replacement: Callable[[str], str]) -> str:
    """Replace the secrets in the queries of addresses, such as `https://host/x?sig=123`, by what their names give."""

    def shown(match: re.Match) -> str:
        sign, name = match.groups()
        return f"{sign}{name}={replacement(name)}" if name == "key" or is_secret(name) else match[0]

    return _QUERY.sub(shown, text)


def hide_in_text(text: str) -> str:
    """Return `text` with `***` for its secrets, as in `api_key: 123` or `https://me:password@host`."""

    def hide(match: re.Match) -> str:
        name, between, _ = match.groups()
        if name == "token" and match.string[: match.start()].endswith(_BEFORE_TOKEN):
            return match[0]  # prose, such as "has no mask token: ..."
        return f"{name}{between}{HIDDEN}" if any(map(is_secret, name.split("."))) else match[0]

    shown = _in_queries(_BEARER.sub(HIDDEN, _LOGIN.sub(HIDDEN, _PEM.sub(HIDDEN, text))), lambda _: HIDDEN)
    return _GOT.sub(hide, _VALUE.sub(hide, shown))


def hide_in_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with `***` for secrets, whole values or parts of them."""
    shown: list[str] = []
    for word in words:
        before = shown[-1] if shown else ""
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            shown.append(f"{option}={_hide_value(option, value)}")
        elif before.startswith("--") and "=" not in before and not word.startswith("--"):
            shown.append(_hide_value(before, word))
        else:
            shown.append(hide_in_text(word))
    return shown


def _hide_value(option: str, value: str) -> str:
    """Return the value of an option with `***` for secrets; a mapping or a list is searched key by key."""
    if any(map(is_secret, option.lstrip("-").split("."))):
        return HIDDEN
    if value.lstrip().startswith(("{", "[")):
        import yaml  # imported late, for a fast --help

        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            return hide_in_text(value)
        hidden = without_secrets(content)
        return value if hidden == content else yaml.safe_dump(hidden, default_flow_style=True, width=10**6).strip()
    return hide_in_text(value)
