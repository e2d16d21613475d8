//! The derive macros of `diesel-session`, which re-exports them and documents them.

#![forbid(unsafe_code)]

mod backends;
mod entity;
mod model;
mod new_entity;
mod update;
mod words;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// See `diesel_session::orm`.
#[proc_macro_derive(Entity, attributes(entity, diesel))]
pub fn entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// See `diesel_session::orm`.
#[proc_macro_derive(NewEntity, attributes(entity, diesel))]
pub fn new_entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    new_entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}
