"""A whole run from one `TrainConfig`, in three acts: it is prepared, it trains, and it is finished."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.failures import is_out_of_memory, out_of_memory
from apart_hf.runs.interruption import StopRequest, noticing_lost_processes
from apart_hf.runs.prepare import prepare
from apart_hf.runs.time_limit import TimeLimit
from apart_hf.utils.allocator import keep_freed_memory


@noticing_lost_processes()
def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes.

    The process then keeps the memory that it frees, unless `no_mallopt` says otherwise; see `keep_freed_memory`.

    Args:
        config: what was given; what it leaves open is decided from the data, the model and the machine.

    Returns:
        The run's folder, OUTPUT/EXPERIMENT.

    Raises:
        ApartError: before anything is written, where the settings do not fit each other or the data; later, where
            training cannot go on, see `apart_hf.runs.failures`.
        Interrupted: where it stopped and can be resumed.

    Example:
        >>> from apart_hf import TrainConfig, train
        >>> folder = train(TrainConfig(model="test_resnet", dataset="demo", method="apart", max_steps=2))
        >>> sorted(file.name for file in (folder / "last").iterdir())
        ['class_map.txt', 'config.json', 'model.safetensors']
    """
    check_names(config)
    config = fill_defaults(config)
    if not config.no_mallopt:
        keep_freed_memory()
    stop = StopRequest(limit=TimeLimit.of(config))
    try:
        with stop.listening():
            run = prepare(config, stop)
            with closing(run.loaders), run.trackers:
                run.fit()
                return run.finish()
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config) from error
        raise
