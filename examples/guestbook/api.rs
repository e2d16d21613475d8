//! The answers as JSON.

use rouille::Response;
use serde_json::{Value, json};

use crate::entry::Entry;
use crate::form::{Problems, Refusal};
use crate::page::Page;

pub(crate) fn page(page: &Page) -> Response {
    let entries: Vec<Value> = page.entries.iter().map(value).collect();
    Response::json(&json!({ "entries": entries, "page": page.number, "pages": page.pages, "total": page.total }))
}

pub(crate) fn entry(entry: &Entry) -> Response {
    Response::json(&value(entry))
}

pub(crate) fn problems(problems: &Problems) -> Response {
    Response::json(&json!({ "errors": { "author": problems.author, "message": problems.message } }))
        .with_status_code(400)
}

pub(crate) fn refusal(refusal: &Refusal) -> Response {
    Response::json(&json!({ "error": refusal.reason })).with_status_code(refusal.status)
}

fn value(entry: &Entry) -> Value {
    json!({
        "id": entry.id,
        "author": entry.author,
        "message": entry.message,
        "written_at": entry.written_at.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
    })
}
