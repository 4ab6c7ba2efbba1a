"""Checks of the course's exercises: hand in an answer, read "correct" or what is wrong with it.

    from drs_course import checks

    checks.suppress(my_suppress)              a function that you wrote: hand in the function itself
    checks.two_maps((5.7, 2.4))               numbers worked out by hand
    checks.delta_one("CAM")                   a prediction

Every check returns a :class:`~drs_course.checks.verdict.Verdict`, a string: ``"correct"``, or a sentence that
begins with "Not yet:" and says what was tried, what came out, what was expected and, where the slip is a
known one, its likely cause. A check never raises for a wrong answer, changes no random state, and always
tries the same inputs. ``python -m drs_course.checks`` lists them with the answer that each expects; so does
``help(checks.suppress)`` for one.
"""

# ruff: noqa: F401, I001 - __all__ finds what is imported here.
# fmt: off
from drs_course.checks.by_hand import (
    all_ones_map, broken_inputs, conflict_pixel, delta_near_zero, delta_one, dense_pairs, five_by_five,
    ignored_share, larger_heads, lazy_network, max_pooling_map, minmax_scores, refinement_mean,
    second_map, shared_stages, shuffled_targets, soft_properties, two_maps, vgg16_fields, weight_decay,
    within_two_sd, without_saliency,
)
from drs_course.checks.fields import effective_field, receptive_field, span_of_two
from drs_course.checks.maps import (
    cue_changes, cue_scores, global_max_pooling, keep_largest, localization_map, map_of_image_size,
    minmax_map, mse_of_labels, peak_region,
)
from drs_course.checks.pixels import miou, pseudo_labels, release_rule
from drs_course.checks.suppression import (
    algorithm_1, channel_controller, control_correlation, erasing, fixed_controller, learnable_controller,
    soft_suppressor, suppress,
)
# fmt: on

__all__ = sorted(name for name, one in globals().items() if hasattr(one, "exercise"))


def __getattr__(name):
    raise AttributeError(f"there is no check {name!r}; the checks are {', '.join(__all__)}")
