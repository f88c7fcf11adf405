"""Puts the native step into wheels. Used by the build backend only, see `pyproject.toml`.

A wheel with the library is one for this platform, and for any Python. Without a compiler it is a
pure one, and workers compute with torch. An editable install builds nothing: `make native` does.
"""

import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeStepHook(BuildHookInterface[Any]):
    """Found by hatchling as the only hook class of this file."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raises BuildError for sources that do not compile."""
        if self.target_name != "wheel" or version == "editable":
            return
        sys.path.insert(0, self.root)
        from services.worker.native.build import NoCompilerError, build

        try:
            path = build()
        except NoCompilerError as error:
            self.app.display_warning(f"a wheel without the native step: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(path)] = str(path.relative_to(self.root))
