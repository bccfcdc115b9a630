"""Options about where a model runs."""

from __future__ import annotations

from typing import Any

import click


class DeviceName(click.Choice):  # type: ignore[type-arg]
    """The devices, and the one more that builds for tests have."""

    def __init__(self) -> None:
        super().__init__(["auto", "cpu", "cuda"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Also take the device of test builds."""
        if value == "cuda-host":
            from moerun import _moerun

            if value in _moerun.DEVICES:
                return value
        return super().convert(value, param, ctx)


def check_cpu_kernels(name: str) -> None:
    """Refuse kernels that this build does not have."""
    from moerun import build_info

    names = ["auto", *build_info()["cpu_kernels"]["compiled"]]
    if name not in names:
        raise click.BadParameter(
            f"{name!r} is not one of {', '.join(names)}.", param_hint="'--cpu-kernels'"
        )
