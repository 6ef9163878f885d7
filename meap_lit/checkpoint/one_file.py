"""Read a checkpoint in one file, as version 0.1 and Lightning's own Trainer write it.

Such a file is the whole checkpoint by `torch.save`. `OneFile` presents it to torch.distributed.checkpoint as a folder,
so that one path reads both forms. Version 0.1 kept the checksum of a file in the comment of its ZIP archive.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from meap_lit.checkpoint.content import divide, load
from meap_lit.errors import UserError


class OneFile(dcp.StorageReader):
    """A checkpoint in one file, its tensors mapped into memory."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def trainer_state(self) -> dict[str, Any]:
        """Return all but the weights and the state of the optimizers."""
        return self._divided()[1]

    def _divided(self) -> tuple[dict[str, Any], dict[str, Any]]:
        content = load(self.file)
        if not isinstance(content.get("state_dict"), dict):
            raise UserError(f"{self.file} is not a checkpoint: it has no state_dict in it")
        return divide(content)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index that the checkpoint would have as a folder."""
        self._saved = dcp.DefaultSavePlanner()
        self._saved.set_up_planner(self._divided()[0], is_coordinator=True)
        plan = self._saved.create_local_plan()
        self._items = {item.index.fqn: item for item in plan.items}
        return self._saved.create_global_plan([plan])[1]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            value = self._saved.resolve_data(self._items[item.storage_index.fqn])
            if isinstance(value, io.BytesIO):
                value.seek(0)
                planner.load_bytes(item, value)
                continue
            starts_and_lengths = zip(item.storage_offsets, item.lengths, strict=True)
            part = value[tuple(slice(start, start + length) for start, length in starts_and_lengths)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return Path(checkpoint_id).is_file()


def comment(file: Path) -> bytes:
    """Return the comment of the ZIP archive that `torch.save` makes of a checkpoint.

    Raises:
        UserError: If the end of the file is missing.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment
    except Exception as error:  # a damaged archive may fail in any way
        raise UserError(
            f"checkpoint file {file} is cut short, or no checkpoint at all; name an earlier checkpoint"
        ) from error
