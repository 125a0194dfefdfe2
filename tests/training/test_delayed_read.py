"""Numbers of a GPU that are looked at without waiting, with a stand-in for the copy."""

import torch

from utils.training.delayed_read import DelayedRead
from utils.training.loop import Meters


class Copies:
    """Copies that arrive when they are told to."""

    def __init__(self):
        self.here, self.asked = True, 0

    def __call__(self, value):
        self.asked += 1
        return value.clone(), lambda: self.here


def test_a_look_gives_what_the_look_before_has_asked_for():
    copies = Copies()
    delayed, value = DelayedRead(copies), torch.zeros(2)
    assert delayed(value, "first") is None
    value += 1
    seen, tag = delayed(value, "second")
    assert seen.tolist() == [0, 0] and tag == "first"
    copies.here = False
    assert delayed(value, "third") is None and copies.asked == 2  # the second is still on its way
    copies.here = True
    seen, tag = delayed(value, "fourth")
    assert seen.tolist() == [1, 1] and tag == "second"


def test_in_main_memory_a_look_gives_the_number_of_now():
    value = torch.ones(2)
    assert DelayedRead()(value, None)[0] is value


def test_means_of_the_look_before_have_the_names_of_then():
    meters = Meters(_delayed_sums=DelayedRead(Copies()))
    assert meters.latest() == {}
    meters.update({"box": torch.tensor(1.0), "obj": torch.tensor(3.0)})
    assert meters.latest() == {}
    meters.update({"box": torch.tensor(2.0), "obj": torch.tensor(5.0)})
    meters.update({"ratio": torch.tensor(7.0)})
    assert meters.latest() == {"box": 1.0, "obj": 3.0}
    assert meters.latest() == meters.means() == {"box": 1.5, "obj": 4.0, "ratio": 7.0}


def test_what_was_asked_for_can_be_forgotten():
    delayed, value = DelayedRead(Copies()), torch.zeros(2)
    assert delayed(value, "first") is None
    delayed.forget()
    value += 1
    assert delayed(value, "second") is None
    seen, tag = delayed(value, "third")
    assert seen.tolist() == [1, 1] and tag == "second"
