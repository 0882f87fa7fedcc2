() => {
  const byId = (id) => document.getElementById(id);
  const press = (id) => {
    const part = byId(id);
    const button = part && (part.tagName === "BUTTON" ? part : part.querySelector("button"));
    if (button && !button.disabled && button.offsetParent !== null) button.click();
  };
  const scrubber = () => [...document.querySelectorAll('.vgen-scrub input[type="range"]')].find((range) => range.offsetParent !== null);
  const move = (by, wrap) => {
    const range = scrubber();
    if (!range) return false;
    const next = Number(range.value) + by;
    if (next > Number(range.max) && !wrap) return false;
    range.value = String(next > Number(range.max) ? Number(range.min) : Math.max(Number(range.min), next));
    range.dispatchEvent(new Event("input", { bubbles: true }));
    return true;
  };
  let playing = null;
  const stopPlaying = () => { clearInterval(playing); playing = null; };
  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target.closest("button") : null;
    if (!target) return;
    if (target.id === "keys") byId("keys-list").showModal();
    if (target.id === "theme") {
      const dark = document.body.classList.toggle("dark");
      try { localStorage.setItem("vgen-theme", dark ? "dark" : "light"); } catch (error) { /* private window */ }
    }
    if (target.closest(".vgen-play")) {
      if (playing) return stopPlaying();
      const range = scrubber();
      if (range && range.value === range.max) { range.value = range.min; range.dispatchEvent(new Event("input", { bubbles: true })); }
      playing = setInterval(() => { if (!move(1, false)) stopPlaying(); }, 250);
    }
  });
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); return ["go", "edit-go", "branch-go", "race-go", "grid-go"].forEach(press); }
    const typing = event.target instanceof Element && event.target.closest("input, textarea, select, [contenteditable], dialog");
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) return ["stop", "edit-stop", "branch-stop", "race-stop", "grid-stop"].forEach(press);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "r" || event.key === "R") press("reroll");
    else if (event.key === "?") byId("keys-list")?.showModal();
    else if (event.key === "ArrowLeft" && move(-1)) event.preventDefault();
    else if (event.key === "ArrowRight" && move(1)) event.preventDefault();
  });
  let wanted = null;
  try { wanted = localStorage.getItem("vgen-theme"); } catch (error) { /* private window */ }
  if (wanted) document.body.classList.toggle("dark", wanted === "dark");
}
