"""A checked problem holds what it was given, completed."""

import math

import pytest
import torch

from stabletx import Mask
from stabletx.functional._problem import checked_problem

NAMES = ("q", "k", "v", "bias", "sinks")


def tensors():
    shapes = ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 7), (1, 4, 3, 6), (4,))
    return dict(zip(NAMES, map(torch.randn, shapes), strict=True))


def problem_of(q, k, v, *, bias=None, sinks=None, mask=None, scale=None, dropout=(0.0, None)):
    return checked_problem(q, k, v, mask, bias, scale, 2.0, sinks, *dropout)


def test_a_problem_is_converted_and_changed_whole():
    given = tensors()
    problem = problem_of(**given)
    assert all(a is b for a, b in zip(problem.tensors, given.values(), strict=True))
    assert problem.out_shape == (2, 4, 3, 7)
    doubled = problem.map(torch.Tensor.double)
    for name, x in given.items():
        assert torch.equal(getattr(doubled, name), x.double())
    others = [-x for x in given.values()]
    changed = problem.with_tensors(*others[:3]).with_extras(*others[3:])
    assert all(a is b for a, b in zip(changed.tensors, others, strict=True))
    bare = problem_of(given["q"], given["k"], given["v"])
    assert [x.dtype for x in bare.map(torch.Tensor.double).tensors] == [torch.float64] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_needs_a_gradient_where_any_tensor_wants_one(name):
    given = tensors()
    assert not problem_of(**given).needs_grad
    given[name].requires_grad_()
    assert problem_of(**given).needs_grad
    with torch.no_grad():
        assert not problem_of(**given).needs_grad


def test_the_scale_is_that_of_the_head_dim_unless_given():
    given = tensors()
    assert problem_of(**given).scale == 5**-0.5
    assert problem_of(**given, scale=0.3).scale == 0.3
    empty = {name: x[..., :0] if name in "qkv" else x for name, x in given.items()}
    assert problem_of(**empty).scale == 1.0


def test_dropout_is_kept_while_training_alone():
    given = tensors()
    assert problem_of(**given, dropout=(0.5, True)).dropout_p == 0.5
    assert problem_of(**given, dropout=(0.5, False)).dropout_p == 0.0


def test_sight_joins_the_mask_and_what_the_bias_blocks():
    given = tensors()
    given["bias"][0, 1, 2, 3] = -math.inf
    allowed = torch.rand(2, 1, 3, 6) > 0.5
    for mask in (allowed, Mask.dense(allowed)):
        dense = problem_of(**given, mask=mask).sight().dense()
        assert torch.equal(dense, allowed & (given["bias"] != -math.inf))
