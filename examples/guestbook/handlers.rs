//! The handlers of requests.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use diesel_session::Result;

use crate::entry::Entry;
use crate::form::{Form, Problems, Refusal};
use crate::page::Page;
use crate::request::Request;
use crate::{api, html};

/// Answers a request. Runs inside the context of the request.
pub(crate) fn answer(request: &Request) -> Result<Response> {
    let path: Vec<&str> = request.uri().path().split('/').skip(1).collect();
    match (request.method().as_str(), &path[..]) {
        ("GET" | "HEAD", [""]) => show(request),
        ("POST", ["entries"]) => add(request),
        // The address in the browser after a refused entry.
        ("GET" | "HEAD", ["entries"]) => Ok(Redirect::to("/").into_response()),
        ("POST", ["entries", id, "delete"]) => delete(request, id),
        ("GET" | "HEAD", ["api", "entries"]) => Ok(api::page(&Page::load(Page::wanted(request))?)),
        ("POST", ["api", "entries"]) => add_by_api(request),
        _ => Ok(not_found(request)),
    }
}

/// The response to a request whose handler failed. It does not tell the visitor the reason.
pub(crate) fn failure(request: &Request) -> Response {
    let reason = "This is our fault. Please try again later.";
    notice(request, StatusCode::INTERNAL_SERVER_ERROR, "Something went wrong", reason)
}

fn show(request: &Request) -> Result<Response> {
    let page = Page::load(Page::wanted(request))?;
    Ok(html::guestbook(&page, &Form::default(), &Problems::default()))
}

fn add(request: &Request) -> Result<Response> {
    let form = match Form::read(request) {
        Ok(form) => form,
        Err(refusal) => return Ok(html::notice(refusal.status, "That did not work", refusal.reason)),
    };
    match form.check() {
        Ok(entry) => {
            entry.insert()?;
            Ok(Redirect::to("/").into_response())
        }
        Err(problems) => {
            let page = html::guestbook(&Page::load(1)?, &form, &problems);
            Ok((StatusCode::BAD_REQUEST, page).into_response())
        }
    }
}

fn add_by_api(request: &Request) -> Result<Response> {
    let form = match Form::read(request) {
        Ok(form) => form,
        Err(refusal) => return Ok(api::refusal(&refusal)),
    };
    match form.check() {
        Ok(entry) => Ok(api::created(&entry.insert()?)),
        Err(problems) => Ok(api::problems(&problems)),
    }
}

fn delete(request: &Request, id: &str) -> Result<Response> {
    match id.parse() {
        Ok(id) if Entry::delete(id)? => Ok(Redirect::to(&Page::link(Page::wanted(request))).into_response()),
        _ => Ok(not_found(request)),
    }
}

fn not_found(request: &Request) -> Response {
    notice(request, StatusCode::NOT_FOUND, "Not found", "There is nothing here.")
}

/// A notice as HTML or JSON, depending on the path of the request.
fn notice(request: &Request, status: StatusCode, title: &str, reason: &'static str) -> Response {
    if request.uri().path().starts_with("/api/") {
        api::refusal(&Refusal { status, reason })
    } else {
        html::notice(status, title, reason)
    }
}
