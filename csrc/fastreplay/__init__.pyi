from fastreplay._device import cuda_problem as cuda_problem
from fastreplay.frame_replay import Batch as Batch
from fastreplay.frame_replay import FrameReplay as FrameReplay
from fastreplay.sum_tree import SumTree as SumTree

def backends() -> tuple[str, ...]: ...
