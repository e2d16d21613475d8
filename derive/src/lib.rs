//! The macros of `diesel-session`, which re-exports them and documents them.

#![forbid(unsafe_code)]

mod backends;
mod entity;
mod model;
mod new_entity;
mod test;
mod update;
mod words;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a struct an entity: a table's row that a `Session` keeps by its key. It goes beside `#[derive(Queryable, Selectable)]`, on a
/// `Clone` struct with named fields, each a column. The guide is the documentation of `diesel_session::orm`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(new = NewUser)]` | makes the struct of new rows, with all fields but the `generated` ones and the `version`; foreign keys are `Fk<Parent>` |
/// | `#[entity(new_derive(Default, ..))]` | what that derives beside `Debug`, `Clone` and `Insertable` |
/// | `#[entity(connection = AnyConnection)]` | also for this enum of connections; may be given several times |
/// | `#[entity(row_by_row)]` | each new row and each update is a statement of its own |
/// | `#[diesel(..)]` | `table_name`, `primary_key`, `belongs_to` and `check_for_backend` are read as Diesel reads them |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(generated)]` | the database makes it, and it is read back |
/// | `#[entity(version)]` | an integer that each update raises by one and asks for: `Error::Stale` where somebody else was faster |
/// | `#[entity(references = Parent)]` | a foreign key that no `belongs_to` names |
/// | `#[diesel(column_name = ..)]` | as Diesel reads it; `embed`, `serialize_as` and `select_expression` are refused |
#[proc_macro_derive(Entity, attributes(entity, diesel))]
pub fn entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes a struct with `#[derive(Insertable)]` a new row of an entity, for `Session::add`: where the one that `#[entity(new = ..)]` makes
/// does not fit. The guide is the documentation of `diesel_session::orm`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(User)]` | what it is a new row of; must be there |
/// | `#[entity(User, key(country, number))]` | the fields of the key, where the program makes it; without, the database does |
/// | `#[entity(User, connection = AnyConnection)]` | also for this enum of connections |
/// | `#[entity(User, row_by_row)]` | each new row is a statement of its own |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(write_only)]` | the entity has no field of this name; others are compared with what was inserted |
///
/// A foreign key is an `Fk<Parent>`, or `Option<Fk<Parent>>`.
#[proc_macro_derive(NewEntity, attributes(entity, diesel))]
pub fn new_entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    new_entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes a function a test with an application and a database of its own, which are gone when it has ended in whatever way. The guide
/// is the documentation of `diesel_session::testing`.
///
/// The function takes an `App<C>`, or nothing, and returns nothing or a `Result`. It runs in a context of that application.
///
/// | argument | |
/// |---|---|
/// | `DB` | the database object, a `static`; must be there, and first |
/// | `isolation = Rollback` | `Database` (the default), `Schema`, `Rollback`, or an expression |
/// | `max_size = 2` | most connections; 4 |
/// | `fixtures("users.sql", ..)` | SQL files, relative to the source file as for `include_str!` |
/// | `fixture = path::to::function` | a function, `fn(&Session<C>) -> Result<()>` |
/// | `config = expression` | the server and the application's options, a `Config`; the URL in `DATABASE_URL` |
/// | `warn_repeats = 10` | warns where one statement is sent more often |
/// | `keep = true` | leaves the database of a test that fails |
///
/// Other attributes, such as `#[should_panic]` and `#[ignore]`, stay what they are.
#[proc_macro_attribute]
pub fn test(arguments: TokenStream, function: TokenStream) -> TokenStream {
    test::expand(arguments.into(), function.into()).unwrap_or_else(|error| error.to_compile_error()).into()
}
