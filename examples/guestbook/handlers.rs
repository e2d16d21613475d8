//! What is answered to which request.

use diesel_session::Result;
use rouille::{Request, Response};

use crate::entry::Entry;
use crate::form::{Form, Problems, Refusal};
use crate::page::Page;
use crate::{api, html};

/// The answer to a request. It runs inside the request's context.
pub(crate) fn answer(request: &Request) -> Result<Response> {
    let path = request.url();
    let path: Vec<&str> = path.split('/').skip(1).collect();
    match (request.method(), &path[..]) {
        ("GET" | "HEAD", [""]) => show(request),
        ("POST", ["entries"]) => add(request),
        ("POST", ["entries", id, "delete"]) => delete(request, id),
        ("GET" | "HEAD", ["api", "entries"]) => Ok(api::page(&Page::load(Page::wanted(request))?)),
        ("POST", ["api", "entries"]) => add_by_api(request),
        _ => Ok(not_found(request)),
    }
}

/// The answer where there is none because something broke. Why is not the visitor's business.
pub(crate) fn failure(request: &Request) -> Response {
    notice(request, 500, "Something went wrong", "This is our fault. Please try again later.")
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
            Ok(Response::redirect_303("/"))
        }
        Err(problems) => Ok(html::guestbook(&Page::load(1)?, &form, &problems).with_status_code(400)),
    }
}

fn add_by_api(request: &Request) -> Result<Response> {
    let form = match Form::read(request) {
        Ok(form) => form,
        Err(refusal) => return Ok(api::refusal(&refusal)),
    };
    match form.check() {
        Ok(entry) => Ok(api::entry(&entry.insert()?).with_status_code(201)),
        Err(problems) => Ok(api::problems(&problems)),
    }
}

fn delete(request: &Request, id: &str) -> Result<Response> {
    match id.parse() {
        Ok(id) if Entry::delete(id)? => Ok(Response::redirect_303(Page::link(Page::wanted(request)))),
        _ => Ok(not_found(request)),
    }
}

fn not_found(request: &Request) -> Response {
    notice(request, 404, "Not found", "There is nothing here.")
}

/// One thing to say, in the form in which the request wants its answers.
fn notice(request: &Request, status: u16, title: &str, reason: &'static str) -> Response {
    if request.url().starts_with("/api/") {
        api::refusal(&Refusal { status, reason })
    } else {
        html::notice(status, title, reason)
    }
}
