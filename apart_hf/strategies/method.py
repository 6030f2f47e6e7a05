"""A method: the perturbations that it combines, how it combines gradients, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apart_hf.strategies.combination import MeanBySamples, PerturbedAlone
from apart_hf.strategies.perturbation import Perturbation


@dataclass(frozen=True)
class Method:
    """Names a point of the min-max scheme of Eq. 2, in the table `METHODS`.

    Args:
        summary: one line for `--help` and the docs.
        perturbations: the classes of what is moved before the second pass; none: a plain step.
        keeps_clean_gradient: True: M/(M+N) of the clean and N/(M+N) of the perturbed gradient (Algorithm 1, line 12).
            False: the perturbed gradient alone (R = 0 in Eq. 2, as in SAM).
        defaults: hyper-parameters that differ from the perturbations' own defaults.
        combination: the class of how the two gradients become one, where that is neither; None: as
            `keeps_clean_gradient` says.

    Example:
        >>> from apart_hf import METHODS
        >>> METHODS["apart"].summary
        'perturbed BN statistics (Algorithm 1)'
        >>> METHODS["apart"].hyper_parameters()
        {'epsilon': 0.1, 'groups': 16, 'ratio': 1.0, 'local_attack': False}
        >>> METHODS["apart"].passes(ratio=0.5, every=2)
        1.25
    """

    summary: str
    perturbations: tuple[type[Perturbation], ...] = ()
    keeps_clean_gradient: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
    combination: type[MeanBySamples] | None = None

    @property
    def combined_by(self) -> type[MeanBySamples]:
        """Tell how the two gradients become one.

        Example:
            >>> from apart_hf import METHODS
            >>> METHODS["apart"].combined_by.__name__, METHODS["gsam"].combined_by.__name__
            ('MeanBySamples', 'SurrogateGap')
        """
        return self.combination or (MeanBySamples if self.keeps_clean_gradient else PerturbedAlone)

    def hyper_parameters(self) -> dict[str, Any]:
        """List every hyper-parameter of the method with its default: numbers, then options.

        Returns:
            The defaults by the names that `create_strategy` takes.

        Example:
            >>> from apart_hf import METHODS
            >>> METHODS["sam"].hyper_parameters()
            {'rho': 0.05, 'global_norm': False}
        """
        found = {name: value for p in self.perturbations for name, value in p.defaults.items()}
        found |= self.combined_by.defaults
        if self.perturbations and self.combined_by.keeps_clean_gradient:
            found["ratio"] = 1.0
        found |= self.defaults
        return dict(sorted(found.items(), key=lambda item: isinstance(item[1], bool)))

    def passes(self, ratio: float | None = None, every: int = 1, **hyper: Any) -> float:
        """Tell the mean cost of a step, in passes (forward and backward) over the batch.

        Args:
            ratio: N/M, the share of the batch in the second pass; None: the method's own.
            every: how many steps there are to one with a second pass.
            **hyper: further hyper-parameters, where they are not the method's own.

        Returns:
            1 for a plain step, 1 + ratio (1 + K) / every where there is a second pass, with K passes of the ascent
            before it (`Perturbation.further_passes`).

        Example:
            >>> from apart_hf import METHODS
            >>> METHODS["standard"].passes(), METHODS["apart"].passes(), METHODS["apart"].passes(every=4)
            (1.0, 2.0, 1.25)
        """
        if not self.perturbations:
            return 1.0
        hyper = self.hyper_parameters() | hyper
        further = max(p.further_passes(**{key: hyper[key] for key in p.defaults}) for p in self.perturbations)
        return 1 + (hyper.get("ratio", 1.0) if ratio is None else ratio) * (1 + further) / every
