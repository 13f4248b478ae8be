"""Vega, Vega-Lite and Vega-Embed as one script to stand inside a page: what a page needs to draw without a network.

The script comes with the package vl-convert-python, and is the same for the same version of it.
"""

from __future__ import annotations

import vl_convert

# DVC fills in `{refresh_tag}` and `{plot_divs}`. There is no `{scripts}`: that would load Vega from a network.
_DVC_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DVC plots</title>
{refresh_tag}
<script>%s</script>
<style>body { font-family: system-ui, sans-serif; margin: 1rem } table { border-spacing: 15px }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def script() -> str:
    """JavaScript that sets `window.vegaEmbed`."""
    made: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # In a function of its own, so that its names are not the page's; no text in it may end the element around it.
    return "(() => {\n" + made.replace("</script", "<\\/script") + "\n})();"


def dvc_template() -> str:
    """A page for `plots.html_template` of DVC's config, with the script in place of links to one."""
    return _DVC_PAGE % script()
