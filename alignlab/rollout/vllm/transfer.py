"""How a policy's weights get into servers: by files, by memory of the GPU that both use (CUDA IPC), or by NCCL.

The last two are vLLM's weight transfer (docs.vllm.ai, Training: Weight Transfer): init, start, update in parts, finish.
vLLM need not be installed beside the trainer: what it documents goes over its HTTP interface, tensors by PyTorch.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.private_api import problem
from alignlab.models import PackedModel, private_api
from alignlab.rollout.settings import VllmSettings
from alignlab.rollout.vllm import weights
from alignlab.rollout.vllm.layout import Replica
from alignlab.rollout.vllm.server import Server, nccl_of

PART = 1 << 28
"""Bytes of weights that are sent at once, where one tensor alone is not more."""

Weights = Iterable[tuple[str, Tensor]]
"""Whole weights by the names that a saved model has, one after the other."""

Part = list[tuple[str, Tensor]]

REASONS = {
    "adapter": "a LoRA adapter is small and is read from a file",
    "cpu": "there is no GPU",
    "url": "the server runs already: start it for nccl and give rollout.vllm.transfer=nccl, or keep a shared folder",
    "port": "others on this host could reach the server by its port: leave rollout.vllm.port out",
}
"""Why whole weights do not go from GPU to GPU."""

Owned = Sequence[tuple[Replica, Server]]
"""The servers that this process gives weights, perhaps none."""


def choose(settings: VllmSettings, replicas: Sequence[Replica], by_adapter: bool) -> tuple[str, str]:
    """How weights get to the servers, by `rollout.vllm.transfer`, and why: "ipc" where they share the trainer's GPUs,
    "nccl" where they have GPUs of their own and the same NCCL, else "disk", as for every LoRA adapter.

    Raises:
        ConfigError: what is asked for cannot be.
    """
    asked = settings.transfer
    shares = any(replica.shares for replica in replicas)
    fitting = "ipc" if shares else "nccl" if settings.url or any(replica.devices for replica in replicas) else "disk"
    if by_adapter:
        why = REASONS["adapter"]
    elif fitting == "disk":
        why = REASONS["cpu"]
    elif settings.url and asked == "auto":
        why = REASONS["url"]
    elif fitting == "ipc" and settings.port is not None:
        why = REASONS["port"]
    elif fitting == "nccl" and asked != "disk":
        why = _no_nccl(settings)
    else:
        why = "as asked" if asked == "disk" else ""
    wanted = "disk" if why else fitting
    if asked not in ("auto", wanted):
        why = why or ("servers share the trainer's GPUs" if shares else "servers have GPUs of their own")
        raise ConfigError(f"rollout.vllm.transfer={asked}: {why}: leave it out, weights then go by {wanted}")
    return wanted, why or ("same GPU" if shares else "other GPUs")


def _no_nccl(settings: VllmSettings) -> str:
    """Why weights cannot go by NCCL; empty where they can."""
    if refused := problem("NCCL"):
        return refused
    try:
        ours = str(private_api.nccl_version())
    except AttributeError:
        return "this PyTorch has no NCCL"
    theirs = ours if settings.url else nccl_of(settings)  # what runs already cannot be asked
    return "" if ours == theirs else f"NCCL {ours} here and {theirs or 'none'} with vLLM cannot meet"


class Transfer:
    """Sends whole weights to servers that were started with `--weight-transfer-config` for `backend`.

    Called by all processes of the run: weights that are divided among them are gathered one after the other, and a
    process that owns no server takes part in that.

    Args:
        owned: the servers that this process gives weights.
        gather: the value of every process, in order of rank, on every process.
    """

    backend: str

    def __init__(self, owned: Owned, gather: Callable[[Any], list[Any]]) -> None:
        self.owned, self._gather, self._open = owned, gather, False

    def send(self, policy: PackedModel, dtype: torch.dtype) -> None:
        """Give the servers the policy's weights, in `dtype`.

        Raises:
            ServerLost, Refused: by a server; all weights have been gathered nevertheless, as the other processes need.
        """
        failed: AlignlabError | None = None
        if policy.gathered is None and not self.takes_part:
            return
        for number, part in enumerate(parts(weights.whole(policy, dtype))):
            shared = self._share(part)
            if failed is None:
                try:
                    if not number:
                        self._begin()
                    self._deliver(part, shared)
                except AlignlabError as error:
                    failed = error
            self._settle()
        if failed is not None:
            raise failed
        self._all("/finish_weight_update")

    @property
    def takes_part(self) -> bool:
        """Whether a server needs this process."""
        return bool(self.owned)

    def _begin(self) -> None:
        if not self._open:
            self._connect()
            self._open = True
        self._all("/start_weight_update")

    def _connect(self) -> None:
        """Once, before the first weights."""
        raise NotImplementedError

    def _share(self, part: Part) -> Any:
        """What the processes must do together before a part is delivered, for which it is."""

    def _deliver(self, part: Part, shared: Any) -> None:
        raise NotImplementedError

    def _settle(self) -> None:
        """What the processes must do together once a part is delivered, or is not."""

    def _all(self, path: str, body: dict[str, Any] | None = None) -> None:
        for _, server in self.owned:
            server.client.post(path, body or {})


class Ipc(Transfer):
    """To servers on this process's own GPU: they open its memory by a handle, and copy from there.

    Handles are pickled, which a server reads only with VLLM_ALLOW_INSECURE_SERIALIZATION=1; none but this user can
    reach it: it listens on a Unix socket in a folder of theirs.

    A server on several GPUs needs a handle of each: then processes meet twice for each part.
    """

    backend = "ipc"

    def __init__(self, owned: Owned, gather: Callable[[Any], list[Any]]) -> None:
        super().__init__(owned, gather)
        self._alone = all(gather(all(len(replica.devices) == 1 for replica, _ in owned)))

    @property
    def takes_part(self) -> bool:
        return bool(self.owned) or not self._alone

    def _connect(self) -> None:
        self._all("/init_weight_transfer_engine", {"init_info": {"packed": True}})

    def send(self, policy: PackedModel, dtype: torch.dtype) -> None:
        super().send(policy, dtype)
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # what servers have let go

    def _share(self, part: Part) -> Any:
        """The part in one piece of this GPU's memory, and the handles by which it is opened on each GPU."""
        if self._alone and not self.owned:
            return None
        packed = torch.cat([flat(tensor) for _, tensor in part])
        mine = export(packed)
        return packed, [mine] if self._alone else self._gather(mine)

    def _deliver(self, part: Part, shared: Any) -> None:
        for replica, server in self.owned:
            handles: dict[str, Any] = {}
            for found in shared[1] if self._alone else [shared[1][rank] for rank in replica.shares]:
                handles |= found
            told = described(part) | {
                "tensor_sizes": [tensor.nbytes for _, tensor in part],
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
            }
            server.client.post("/update_weights", {"update_info": told})

    def _settle(self) -> None:
        if not self._alone:
            self._gather(None)  # nobody's memory is used again before every server has read it


class Nccl(Transfer):
    """To servers on other GPUs, by broadcasts of a communicator that this process shares with them."""

    backend = "nccl"

    def _connect(self) -> None:
        """Meet the servers: each is asked by HTTP to come, while this process opens its own end."""
        if not self.owned:
            return
        widths = [int(server.client.get("/get_world_size")["world_size"]) for _, server in self.owned]
        world, key = 1 + sum(widths), private_api.nccl_key()
        info = {"nccl_unique_id_b64": base64.b64encode(key).decode(), "world_size": world, "packed": False}
        asked = self._ask(
            "/init_weight_transfer_engine",
            [{"init_info": info | {"rank_offset": 1 + sum(widths[:i])}} for i in range(len(widths))],
            1.0,
        )
        self._group = private_api.nccl_group(world, key)
        for future in asked:
            future.result()

    def _deliver(self, part: Part, shared: Any) -> None:
        if not self.owned:
            return
        asked = self._ask("/update_weights", [{"update_info": described(part)}] * len(self.owned), 0.02)
        sent = private_api.nccl_broadcast([tensor.contiguous() for _, tensor in part], self._group)
        while not sent.query():
            for future in asked:
                if future.done():
                    future.result()  # a server that is gone never takes the rest
            time.sleep(0.001)
        for future in asked:
            future.result()

    def _ask(self, path: str, bodies: Sequence[dict[str, Any]], seconds: float) -> list[Future[Any]]:
        """Ask every server in a thread of its own; they answer once the tensors are there. Raises what a server refuses
        within so many seconds: NCCL would wait for it for ever."""
        pool = ThreadPoolExecutor(len(bodies))
        asked = [
            pool.submit(server.client.post, path, body) for (_, server), body in zip(self.owned, bodies, strict=True)
        ]
        pool.shutdown(wait=False)
        for future in wait(asked, timeout=seconds).done:
            future.result()
        return asked


def parts(tensors: Weights, size: int | None = None) -> Iterator[Part]:
    """Weights in portions of at most about `size` bytes (by default `PART`), in order."""
    limit = PART if size is None else size
    portion: Part = []
    held = 0
    for name, tensor in tensors:
        if portion and held + tensor.nbytes > limit:
            yield portion
            portion, held = [], 0
        portion.append((name, tensor))
        held += tensor.nbytes
    if portion:
        yield portion


def described(part: Part) -> dict[str, Any]:
    """What a server is told of tensors before it gets them."""
    return {
        "names": [name for name, _ in part],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
        "shapes": [list(tensor.shape) for _, tensor in part],
    }


def flat(tensor: Tensor) -> Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def export(packed: Tensor) -> dict[str, tuple[Any, ...]]:
    """By the GPU's UUID: what another process opens this tensor with.

    Raises:
        AlignlabError: this GPU's memory cannot be shared.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.current_stream().synchronize()  # what it holds must be there
    uuid = torch.cuda.get_device_properties(packed.device).uuid
    try:
        return {str(uuid): reduce_tensor(packed)[1]}
    except RuntimeError as error:
        raise AlignlabError(
            f"rollout.vllm.transfer=ipc: the GPU's memory cannot be shared ({error}): give rollout.vllm.transfer=disk"
        ) from error
