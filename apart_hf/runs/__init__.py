"""One training run, from its settings to the folder that it leaves."""

import platform

from apart_hf.errors import ApartError

try:
    import fcntl  # noqa: F401  holds a run's folder, see runs.resume; process groups come with it
except ImportError as error:
    raise ApartError(
        f"training needs a POSIX system (Linux, macOS, WSL), which {platform.system()} is not; create_strategy in a "
        "loop of your own and load_pretrained need none."
    ) from error
