//! The responses as JSON.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::entry::Entry;
use crate::form::{Problems, Refusal};
use crate::page::Page;

pub(crate) fn page(page: &Page) -> Response {
    let entries: Vec<Value> = page.entries.iter().map(value).collect();
    let page = json!({ "entries": entries, "page": page.number, "pages": page.pages, "total": page.total });
    answer(StatusCode::OK, &page)
}

/// The response with an entry that was just inserted.
pub(crate) fn created(entry: &Entry) -> Response {
    answer(StatusCode::CREATED, &value(entry))
}

pub(crate) fn problems(problems: &Problems) -> Response {
    let problems = json!({ "errors": { "author": problems.author, "message": problems.message } });
    answer(StatusCode::BAD_REQUEST, &problems)
}

pub(crate) fn refusal(refusal: &Refusal) -> Response {
    answer(refusal.status, &json!({ "error": refusal.reason }))
}

fn answer(status: StatusCode, value: &Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn value(entry: &Entry) -> Value {
    json!({
        "id": entry.id,
        "author": entry.author,
        "message": entry.message,
        "written_at": entry.written_at.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
    })
}
