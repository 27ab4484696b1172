"""The base class of the configs of other position methods: a config without a bias."""

from huggingface_hub.dataclasses import strict

from ..model.configuration_alibi_gpt import AlibiGPTConfig


@strict
class UnbiasedConfig(AlibiGPTConfig):
    """Configuration of an AlibiGPT whose slopes are all zero, so that it has neither bias nor windows."""

    window_tolerance: int | float = 0.0

    @property
    def slopes(self) -> list[float]:
        """Zero for every head: distance costs nothing."""
        return [0.0] * self.num_attention_heads

    def validate_architecture(self) -> None:
        """Checks what `AlibiGPTConfig` checks, and that nothing is said about slopes.

        Raises:
            ValueError: If fields contradict each other, or slopes are given or trained. The config raises it as a
                `StrictDataclassError`.
        """
        super().validate_architecture()
        if self.alibi_slopes is not None or self.alibi_slopes_trainable:
            raise ValueError(
                f"{self.model_type} has no slopes, so alibi_slopes={self.alibi_slopes} and "
                f"alibi_slopes_trainable={self.alibi_slopes_trainable} would have no effect; leave them out."
            )
