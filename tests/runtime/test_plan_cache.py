"""What calls have planned is kept, and not without bound."""
import gc

from edgeattn.runtime.plan_cache import PlanCache, planned, shared_plans


def test_a_cache_holds_as_many_plans_as_it_may():
    plans = PlanCache(3)
    for length in range(100):
        assert plans.keep(length, [length]) == [length] and len(plans) <= 3
    assert plans[99] == [99]


def test_the_same_arguments_are_planned_once_and_others_anew():
    made = []

    def plan(*arguments):
        made.append(arguments)
        return list(arguments)

    def other(*arguments):
        return arguments

    assert planned(plan, 1, (2, 3)) is planned(plan, 1, (2, 3)) and made == [(1, (2, 3))]
    assert planned(plan, 1, (2, 4)) == [1, (2, 4)] and planned(other, 1, (2, 3)) == (1, (2, 3))


def test_plans_are_shared_as_long_as_somebody_has_them():
    one = shared_plans(("sizes", 3))
    one.keep("rows", "plan")
    assert shared_plans(("sizes", 3)) is one
    assert shared_plans(("sizes", 4)) is not one
    del one
    gc.collect()
    assert not shared_plans(("sizes", 3))
