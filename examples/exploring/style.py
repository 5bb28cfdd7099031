"""Texts and style sheet of the page."""

import numpy as np
from matplotlib import colormaps, colors

CLICK = "click a point"
KEPT = "bright: more"
CAM = "bright: for the class"
NO_GATES = "<p class='none'>This model has no gates.</p>"
SCORE = (
    "<div class='score'><span>{name}</span><span class='bar'><i style='width: {percent:.1f}%'></i></span>"
    "<span>{percent:.1f} %</span></div>"
)
HEADING = """
<h1>Where the gates look</h1>
<p>Click a point of the picture. The gate of the selected stage scales the feature map there. To compute its
value, it samples the feature map at positions that depend on the picture.</p>
"""
LEGEND = """
<div class="legend">
<p>points by their mask, 0 <span class="ramp"></span> 1</p>
<p><b class="cross">&times;</b> outside the feature map: 0</p>
<p><b class="ring">&#9711;</b> clicked &nbsp; <b class="plus">+</b> nearest position</p>
</div>
"""
_STOPS = ", ".join(colors.to_hex(colormaps["viridis"](share)) for share in np.linspace(0, 1, 9))
CSS = f"""
.gradio-container {{ max-width: 1260px !important; margin: 0 auto !important; }}
h1 {{ font-size: 1.6rem; margin: 0 0 0.2rem; }}
h2 {{ font-size: 1.15rem; margin: 0; }}
h3 {{ display: inline; font-size: 0.95rem; }}
.about, .caption, .legend {{ font-size: 0.85rem; opacity: 0.75; }}
.caption {{ margin: 0; }}
.slot {{ gap: 0.4rem; }}
.html-container {{ padding: 0 !important; }}
.drawing img {{ cursor: crosshair; }}
#gallery .grid-wrap {{ min-height: 0; height: auto; max-height: none; overflow: visible; padding: 0; }}
#gallery .grid-container {{ grid-template-columns: repeat(4, 1fr);
  grid-auto-rows: auto !important; grid-template-rows: none !important; height: auto; gap: 6px; padding: 0; }}
#gallery .thumbnail-item {{ width: 100%; height: auto; aspect-ratio: 1; }}
#gallery {{ border: none !important; }}
#stage .wrap, #stacked .wrap {{ flex-direction: column; gap: 0.3rem; }}
#stage label, #stacked label {{ padding: 0.25rem 0.6rem; }}
.scores {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1.5rem; }}
.score {{ display: flex; align-items: center; gap: 0.5rem; font-size: 0.9rem; }}
.bar {{ width: 6rem; height: 0.5rem; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }}
.bar i {{ display: block; height: 100%; background: var(--primary-500); }}
.none {{ opacity: 0.65; padding: 2rem 1rem; text-align: center; }}
.message {{ border-left: 4px solid #dc2626; background: #fef2f2; color: #7f1d1d; padding: 0.5rem 0.75rem; }}
.legend p {{ margin: 0.2rem 0; }}
.ramp {{ display: inline-block; width: 5rem; height: 0.6rem; border-radius: 3px;
  background: linear-gradient(to right, {_STOPS}); }}
.plus {{ color: #ff0000; }}
.plus, .cross {{ font-size: 1.1rem; }}
"""
