"""Checkpoints as models of EleutherAI's lm-evaluation-harness, under the name `meap_lit`.

    python -m meap_lit.evaluation.harness run --model meap_lit --model_args checkpoint=runs/quickstart --tasks piqa

runs the harness's own command line, with all of its tasks and options. It needs pip install 'meap-lit[harness]'.
"""

import hashlib
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from meap_lit.errors import UserError, in_one_line
from meap_lit.evaluation.runner import batches
from meap_lit.inference.generation import Sampling
from meap_lit.inference.language_model import Dtype, LanguageModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    reason = f"lm-evaluation-harness is needed for this ({error}): pip install 'meap-lit[harness]'"
    if __name__ == "__main__":
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    raise UserError(reason) from error


@register_model("meap_lit")
class HarnessModel(TemplateLM):
    """A checkpoint as a model of the harness.

    Scores equal those of the harness's `hf` model. Context and continuation are tokenized together, after BOS if the
    tokenizer writes one, and cut on the left if they are too long. A text without context is scored after BOS, or after
    EOS if the tokenizer has no BOS. Two things differ: text that spells a special token remains text, and of a
    generation_config.json only the ids that stop or are suppressed count, not a `repetition_penalty` and the like.

    `--apply_chat_template` renders prompts with the tokenizer's own chat template, `--apply_chat_template NAME` with
    one of those of `prepare chat --template`. Special tokens in such a prompt are special, whether the template or a
    message wrote them, as in the `hf` model.

    Args:
        checkpoint: A Hugging Face folder, a Hub id, a .ckpt file or folder, or the folder of a run; or a loaded model.
        tokenizer: Folder or Hub id of the tokenizer; the checkpoint's own by default.
        dtype: Dtype of the weights, float32 or bfloat16; by default and with auto bfloat16 on a GPU, and the
            checkpoint's own on a CPU.
        device: Device such as cpu or cuda:1; auto takes a GPU if there is one. Without a GPU cuda:0, the default of the
            harness's command line, is the CPU, as in the `hf` model.
        batch_tokens: Maximum number of positions in a batch, padding included, unless a single text needs more.
        max_gen_toks: Maximum number of tokens to generate where a task does not set it.
        batch_size: Not used, since batches are limited by their tokens. The harness's command line always passes it.
        max_batch_size: Not used.

    Raises:
        UserError: If there is no such checkpoint or device, or no tokenizer that fits.
    """

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        tokenizer: str | None = None,
        dtype: Dtype | Literal["auto"] | None = None,
        device: str | None = "auto",
        batch_tokens: int = 16_384,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(checkpoint, str):
            if dtype not in (None, "auto", "float32", "bfloat16"):
                raise UserError(f"dtype must be float32, bfloat16 or auto, got {dtype}")
            checkpoint = LanguageModel(checkpoint, tokenizer, None if dtype == "auto" else dtype, _device(device))
        self.model = checkpoint
        self.batch_tokens = batch_tokens
        self.max_gen_toks = max_gen_toks
        self._template = "tokenizer"
        self._has_templated = False
        """Whether texts are prompts of a chat template, in which special tokens are special."""

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Return the model of `--model_args`, which take precedence over other options, such as the default device.

        Raises:
            UserError: If an argument is unknown, or the checkpoint is missing.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict
        try:
            inspect.signature(cls).bind(**given)
        except TypeError as error:
            known = ", ".join(inspect.signature(cls).parameters)
            raise UserError(f"--model_args: {error}; choose from {known}") from error
        return cls(**given)

    @property
    def tokenizer_name(self) -> str:
        """Key under which the harness caches requests; it depends on all that decides the ids of a prompt."""
        template = self.model.chat_template(self._template).source
        return f"{self.model.tokenizer.document_fingerprint[:16]}-{hashlib.sha256(template.encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template of `apply_chat_template` by name, True for the tokenizer's own; return its source."""
        if not chat_template:
            return None
        self._template = "tokenizer" if chat_template is True else chat_template
        return self.model.chat_template(self._template).source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation; without `add_generation_prompt` its last message is open.

        Raises:
            UserError: If the tokenizer has no template, or the template refuses the conversation.
        """
        self._has_templated = True
        template = self.model.chat_template(self._template)
        try:
            return template.render_prompt(chat_history, continue_last=not add_generation_prompt)
        except UserError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            warnings.warn(f"{error}; system messages are left out, as the hf model of the harness does", stacklevel=2)
            return template.render_prompt(without, continue_last=not add_generation_prompt)

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.start_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        if not self._has_templated:
            return tokenizer.encode(string) if add_special_tokens is False else tokenizer.encode_whole(string)
        ids = self.model.chat_template(self._template).encode_text(string)
        is_whole = add_special_tokens is False or ids[:1] == [self.prefix_token_id]  # a template may write BOS itself
        return ids if is_whole else [*tokenizer.before_text, *ids, *tokenizer.after_text]

    def row(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids to score a continuation with, and the position of its first token in them."""
        return self._cut(*self._pair(context, continuation))

    def loses_beginning(self, context: str, continuation: str) -> bool:
        """Return whether `row` leaves out the first ids, since the model has too few positions."""
        before, after = self._pair(context, continuation)
        return max(1, len(before)) + len(after) > self.max_length + 1

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context == "":
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        return self._encode_pair(context, continuation)

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        # the last token is predicted, not read: a row may have one more than the model has positions
        row = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return row, max(1, len(row) - len(continuation))

    def score_rows(
        self, rows: Sequence[tuple[list[int], int]], title: str = "log-likelihoods", show: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the end of each row, and whether greedy decoding would generate it.

        Args:
            rows: Ids and first position of the end, as `row` returns them.
            title: Title of the progress bar.
            show: Show a progress bar.
        """
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
        with tqdm(total=len(rows), desc=title, disable=not show) as bar:
            for indices in batches(longest_first, self.batch_tokens, lambda index: len(rows[index][0])):
                found = self.model.log_probs(
                    [rows[index][0] for index in indices], [rows[index][1] for index in indices]
                )
                for index, (log_probs, is_best) in zip(indices, found, strict=True):
                    scores[index] = float(log_probs.double().sum()), bool(is_best.all())
                bar.update(len(indices))
        return scores

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [self._cut(context, continuation) for _, context, continuation in requests]
        scores = self.score_rows(rows, show=not disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        rows: list[tuple[list[int], int]] = []
        owners = []  # index of the request that each row is a part of
        for owner, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                rows.append(self._cut(*make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        scores = self.score_rows(rows, "log-likelihoods of texts", show=not disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            sums[owner] += score
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same options share batches
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        plans = []  # options and prompts of all groups first, so that a wrong one is not found after hours
        for members in groups.values():
            options = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            prompts = {index: self._prompt(requests[index].args[0], options["max_gen_toks"]) for index in members}
            plans.append((options, _sampling(options), prompts))
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            for options, sampling, prompts in plans:
                lengths = {index: len(prompt) + options["max_gen_toks"] for index, prompt in prompts.items()}
                longest_first = sorted(lengths, key=lengths.__getitem__, reverse=True)
                for indices in batches(longest_first, self.batch_tokens, lengths.__getitem__):
                    continuations = self.model.generate(
                        [prompts[index] for index in indices],
                        max_new_tokens=options["max_gen_toks"],
                        sampling=sampling,
                        batch_size=len(indices),
                        is_done=partial(self._has_stop, stops=[stop for stop in options["until"] if stop]),
                        numbers=indices,  # the harness repeats a request: each has its own draws
                    )
                    for index, ids in zip(indices, continuations, strict=True):
                        texts[index] = postprocess_generated_text(self._text(ids), options["until"], None)
                    bar.update(len(indices))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _text(self, ids: Sequence[int]) -> str:
        # decoded alone, as the hf model does: the decoder of Llama 2 drops a space at the beginning
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def _has_stop(self, ids: Sequence[int], stops: Sequence[str]) -> bool:
        text = self._text(ids)
        return any(stop in text for stop in stops)

    def _prompt(self, context: str, max_gen_toks: int) -> list[int]:
        room = self.max_length - max_gen_toks
        if room < 1:
            raise UserError(f"max_gen_toks {max_gen_toks} leaves no room in the context of {self.model.source.context}")
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:]


def _device(name: str | None) -> torch.device | Literal["auto"]:
    """Return the device of that name, the CPU for a GPU on a machine without one.

    Raises:
        UserError: If torch does not know the device, or this machine has fewer GPUs.
    """
    if not name or name == "auto":
        return "auto"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name} is not known to torch; write cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} does not exist; this machine has {torch.cuda.device_count()} GPUs")
    return device


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
    """Return tasks of the harness, zero-shot, by name; a group gives all of its tasks.

    Args:
        names: Names of tasks and groups.
        include_path: Folder with further tasks as YAML.

    Raises:
        UserError: If a task does not exist, or its data cannot be loaded.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"include_path {include_path} is not a folder; name one with tasks in the YAML of lm-evaluation-harness"
        )
    # the harness has 14,000 files of tasks, which take ten seconds to index: only if they are needed
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]!r}; the command lm_eval ls tasks lists them")
    try:
        tasks = manager.load(list(names))["tasks"]
    except Exception as error:  # from many libraries: no network, unknown data set, no permission, a damaged file
        raise UserError(
            f"cannot load the tasks {', '.join(names)}: {in_one_line(error)}; the data of the harness's tasks is "
            f"downloaded from the Hugging Face Hub at its first use and then kept"
        ) from error
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return tasks


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Return how tokens are drawn; without a temperature the other options have no effect in the harness."""
    temperature = options.get("temperature") or 0.0
    limits: dict[str, Any] = {name: options.get(name) or None for name in ("top_k", "top_p")} if temperature > 0 else {}
    return Sampling(temperature, **limits)


def main() -> int:
    """Run the harness's own command line; return 0, or 2 after wrong input (one line on stderr)."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
