"""A browser for the tests of this folder."""

from chromium import browser as browser
