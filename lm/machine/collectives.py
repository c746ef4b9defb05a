"""Names of torch.distributed that differ between versions of torch, found by feature."""

import inspect
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# before torch 2.13 all_gather_into_tensor and reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
# of DistributedDataParallel: buffers are constants, so no forward pass needs to send them
BUFFERS_STAY: dict[str, Any] = {_SYNC: False}
