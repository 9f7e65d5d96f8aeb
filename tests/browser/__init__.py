"""Journeys in Chromium.

A package, so that its fixtures end with its last test: while Playwright is there, an event loop
runs in the main thread, and other tests could not run one of theirs.
"""
