"""Rows that a selection gets wrong if it can, made from rows of a normal distribution."""

import math

import torch

INF, NAN = math.inf, math.nan


def distinct(v):
    return v


def integers(v):
    return (2 * v).round()


def equal(v):
    return torch.full_like(v, -1.25)


def negative(v):
    return -v.abs() - 1


def nan_and_inf(v):
    order = torch.rand(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = v.masked_fill(order < 0.04, INF).masked_fill(order > 0.96, -INF)
    v = v.masked_fill((order > 0.1) & (order < 0.12), NAN)
    return v.masked_fill((order > 0.2) & (order < 0.22), -NAN)


def all_nan(v):
    return torch.full_like(v, NAN)


def zeros_of_both_signs(v):
    return 0.0 * v.sign()


def denormals(v):
    return v.sign() * (v.abs() * 3).round() * 2.0**-140
