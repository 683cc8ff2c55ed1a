// An answer elsewhere: the request behind it as a curl command, as Python, and a link to this page.

import {$, html, refill} from "./dom.js";

const OPENAI = ["model", "messages", "seed"];

function curl(body, address) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${address}v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n` +
    `  -H "Authorization: Bearer $API_KEY" \\\n  -d '${json}'\n`;
}

/** A JSON value as Python, which differs in true, false and null only. */
function literal(value, indent) {
  const inner = indent + "    ";
  if (Array.isArray(value)) return `[\n${value.map((item) => inner + literal(item, inner)).join(",\n")},\n${indent}]`;
  if (value && typeof value === "object") {
    return "{" + Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, inner)}`).join(", ") + "}";
  }
  return {true: "True", false: "False", null: "None"}[String(value)] ?? JSON.stringify(value);
}

function python(body, address) {
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.includes(name)));
  const given = OPENAI.map((name) => `    ${name}=${literal(body[name], "    ")},\n`).join("");
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${address}v1", api_key="none")  # or your key\n` +
    `answer = client.chat.completions.create(\n${given}    extra_body=${literal(extra, "    ")},\n)\n` +
    "print(answer.choices[0].message.content)\n";
}

/** Show the dialog for a request `body`; `link`: the address of the page with these settings. */
export function offerCopies(body, link) {
  const address = location.href.replace(/[#?].*$/, "").replace(/[^/]*$/, "");
  const forms = {
    curl: [curl(body, address), "Leave the line with the key out if the server has none."],
    Python: [python(body, address), "With the client library \u2018openai\u2019."],
    Link: [link, "It opens this page with these settings and this question, and holds no key."],
  };
  const show = (name) => {
    [$("copy-text").value, $("copy-hint").textContent] = forms[name];
    $("copy-done").textContent = "";
    for (const button of $("copy-kinds").children) button.setAttribute("aria-pressed", String(button.textContent === name));
  };
  refill($("copy-kinds"), Object.keys(forms).map((name) =>
    html("button", {type: "button", class: "plain toggle", onclick: () => show(name)}, name)));
  show("curl");
  $("copy").showModal();
}

/** Wire the dialog's own buttons. */
export function prepareCopies() {
  $("copy-close").addEventListener("click", () => $("copy").close());
  $("copy-now").addEventListener("click", async () => {
    $("copy-text").select();
    try {
      await navigator.clipboard.writeText($("copy-text").value);
      $("copy-done").textContent = "Copied.";
    } catch {
      // Without a secure address the browser leaves copying to the keyboard.
      $("copy-done").textContent = "The text is selected: copy it with your keyboard.";
    }
  });
}
