#!/usr/bin/env python
"""Scores a model version on its held-out sections, beside floors."""
