"""Checks of the course's exercises: hand in an answer, read "correct" or what is wrong with it.

    from drs_lib import checks

    checks.suppress(my_suppress)              a function that you wrote: hand in the function itself
    checks.two_maps((5.7, 2.4))               numbers worked out by hand
    checks.delta_one("CAM")                   a prediction

Every check returns a :class:`~drs_lib.checks.verdict.Verdict`, a string: ``"correct"``, or a sentence that
begins with "Not yet:" and says what was tried, what came out, what was expected and, where the slip is a
known one, its likely cause. A check never raises for a wrong answer, changes no random state, and always
tries the same inputs. ``python -m drs_lib.checks`` lists them with the answer that each expects; so does
``help(checks.suppress)`` for one.

The checks are found on first use, so that importing this package loads nothing.
"""

from importlib import import_module

_CHECKS_OF = {
    "by_hand": (
        "lazy_network",
        "shared_stages",
        "minmax_scores",
        "max_pooling_map",
        "broken_inputs",
        "five_by_five",
        "two_maps",
        "second_map",
        "soft_properties",
        "weight_decay",
        "delta_one",
        "delta_near_zero",
        "within_two_sd",
        "larger_heads",
        "vgg16_fields",
        "refinement_mean",
        "shuffled_targets",
        "conflict_pixel",
        "ignored_share",
        "dense_pairs",
        "all_ones_map",
        "without_saliency",
    ),
    "maps": (
        "localization_map",
        "map_of_image_size",
        "peak_region",
        "minmax_map",
        "cue_scores",
        "global_max_pooling",
        "cue_changes",
        "mse_of_labels",
        "keep_largest",
    ),
    "suppression": (
        "suppress",
        "learnable_controller",
        "algorithm_1",
        "erasing",
        "soft_suppressor",
        "control_correlation",
        "channel_controller",
        "fixed_controller",
    ),
    "fields": ("receptive_field", "effective_field", "span_of_two"),
    "pixels": ("miou", "pseudo_labels", "release_rule"),
}
_HOME_OF = {name: home for home, names in _CHECKS_OF.items() for name in names}

__all__ = list(_HOME_OF)


def __getattr__(name):
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(
        f"there is no check {name!r}; the checks are {', '.join(sorted(_HOME_OF))}"
        if not name.startswith("_")
        else f"module {__name__!r} has no attribute {name!r}"
    )


def __dir__():
    return sorted(set(globals()) | set(__all__))
