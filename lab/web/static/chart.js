// Draws a chart of the API with plotly, in the colours of the page.
"use strict";

async function drawChart(element, address) {
  const answer = await fetch(address);
  if (!answer.ok) return false;
  const figure = await answer.json();
  const narrow = window.matchMedia("(max-width: 640px)").matches;
  if (narrow) figure.layout.margin = { ...figure.layout.margin, l: 58, r: 8 };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  figure.layout.font = { ...figure.layout.font, color: colour("--soft") };
  figure.layout.modebar = { ...figure.layout.modebar, color: colour("--soft"), activecolor: colour("--ink") };
  await Plotly.react(element, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: !narrow,
    showSendToCloud: false, // plotly's default offers to upload the chart
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["lasso2d", "select2d"],
  });
  return true;
}
