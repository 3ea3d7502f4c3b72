"""The labels of a dataset.json: values, regions, ignore."""

import logging

import pytest

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.label_spec import Labels, parse_labels
from unicon_pipeline.records import from_dict, to_dict


def refused(read, *words):
    with pytest.raises(DatasetError) as caught:
        read()
    for word in words:
        assert word in str(caught.value), str(caught.value)


class TestLabels:
    def parse(self, labels, **extra):
        return parse_labels({"labels": labels, **extra}, "dataset.json")

    def test_exclusive(self):
        labels = self.parse({"background": 0, "liver": 1, "spleen": 5, "ignore": 7})
        assert labels == Labels(("liver", "spleen"), ((1,), (5,)), False, (1, 5), 7)
        assert labels.output_channels == 3
        assert from_dict(Labels, to_dict(labels), "here") == labels

    def test_regions(self):
        named = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
        labels = self.parse(named, regions_class_order=[1, 2, 3])
        assert labels == Labels(("whole", "core", "enhancing"), ((1, 2, 3), (2, 3), (3,)), True, (1, 2, 3), 4)
        assert labels.output_channels == 3

    @pytest.mark.parametrize(
        "named,order,words",
        [
            (None, None, "needs labels"),
            ({"background": 0}, None, "nothing but the background"),
            ({"background": 1, "x": 0}, None, "background must"),
            ({"background": 0, "x": 1.0}, None, "whole number"),
            ({"background": 0, "x": True}, None, "whole number"),
            ({"background": 0, "x": -1}, None, "whole number"),
            ({"background": 0, "x": 40_000}, None, "whole number"),
            ({"background": 0, "x": []}, None, "whole number"),
            ({"0": "background", "1": "x"}, None, "nnU-Net version 2"),
            ({"background": 0, "x": 1, "y": 1}, None, "share a value"),
            ({"background": 0, "x": 1, "y": 0}, None, "share the value 0"),
            ({"background": 0, "x": "1"}, None, "whole number"),
            ({"background": 0, "x": [1, [2]]}, [1], "whole number"),
            ({"background": 0, "x": None}, None, "whole number"),
            (["background", "x"], None, "needs labels"),
            ({"background": 0, "x": 1, "ignore": 1}, None, "ignore must"),
            ({"background": 0, "x": 1, "ignore": [2, 3]}, None, "ignore must"),
            ({"background": 0, "x": [0, 1]}, [1], "0 is the background"),
            ({"background": 0, "x": [1, 2], "y": [2]}, None, "regions_class_order"),
            ({"background": 0, "x": [1, 2], "y": [2]}, [1], "regions_class_order"),
            ({"background": 0, "x": [1, 2], "y": [2]}, [1, 9], "regions_class_order"),
            ({"background": 0, "x": [1, 2], "y": [2]}, [True, 2], "regions_class_order"),
            ({"background": 0, "x": [1, 2], "y": [2]}, "12", "regions_class_order"),
        ],
    )
    def test_refused(self, named, order, words):
        refused(lambda: self.parse(named, regions_class_order=order), "dataset.json", words)

    def test_zero_by_another_name_is_the_background(self):
        assert self.parse({"unlabelled": 0, "tumour": 2}) == Labels(("tumour",), ((2,),), False, (2,), None)

    def test_lists_of_one_are_no_regions(self):
        labels = self.parse({"background": [0], "x": [1], "y": [2]})
        assert (labels.regions, labels.values, labels.output_channels) == (False, ((1,), (2,)), 3)

    @pytest.mark.parametrize(
        "named,order,lost",
        [
            ({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3], ()),
            ({"organ": [1, 2, 3], "masses": [2, 3], "tumour": 2}, [1, 3, 2], ()),
            ({"a": [1, 3], "b": [2, 3]}, [1, 2], ()),
            ({"tumour": 2, "whole": [1, 2]}, [2, 1], ("tumour",)),
            ({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [3, 2, 1], ("enhancing",)),
            ({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 3, 3], ("core", "enhancing")),
        ],
    )
    def test_regions_that_an_export_would_lose(self, caplog, named, order, lost):
        with caplog.at_level(logging.WARNING):
            assert self.parse({"background": 0, **named}, regions_class_order=order).written == tuple(order)
        assert (f"cannot show {', '.join(lost)}:" in caplog.text) if lost else caplog.text == ""
