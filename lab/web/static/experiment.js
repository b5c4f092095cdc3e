// The experiment's page: its loss curve over the best's and its parent's.
"use strict";

const curves = document.getElementById("curves");
const drawCurves = () =>
  drawChart(curves, "/api/curves/" + curves.dataset.commit + "?tree=" + encodeURIComponent(curves.dataset.tree));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCurves);
drawCurves();
