// What one takes along: the table as text, commands, pictures.

// From a file the clipboard may be closed; the older way works there.
async function copied(text) {
  if (navigator.clipboard) {
    const done = await navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
    if (done) return true;
  }
  const area = document.body.appendChild(el("textarea", { class: "probe", "aria-hidden": "true" }));
  area.value = text;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

async function copyAndSay(button, text) {
  const before = button.textContent;
  button.textContent = (await copied(text)) ? "Copied" : "Not copied";
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

function copyButton(title, text, more = {}) {
  const button = el("button", { type: "button", class: "screen", ...more }, title);
  button.addEventListener("click", () => copyAndSay(button, text));
  return button;
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function tableButtons() {
  const { csv, markdown, latex } = data.tables;
  const file = el("button", { type: "button", "data-take": "file", onclick: () => download("compare.csv", csv) });
  file.append("CSV file");
  return [
    el("span", { class: "quiet" }, "Copy the table:"),
    copyButton("Markdown", markdown, { "data-take": "markdown" }),
    copyButton("LaTeX", latex, { "data-take": "latex" }),
    copyButton("CSV", csv, { "data-take": "csv" }),
    file,
  ];
}
