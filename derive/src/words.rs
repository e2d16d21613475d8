//! The parser of the attributes `#[diesel(..)]` and `#[entity(..)]`.

use proc_macro2::{Span, TokenStream};
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::punctuated::Punctuated;
use syn::{Attribute, Error, Ident, Path, Result, Token, Type};

/// The `#[diesel(..)]` attributes of a struct.
#[derive(Default)]
pub(crate) struct DieselAttributes {
    pub(crate) table: Option<Path>,
    pub(crate) primary_key: Option<Vec<Ident>>,
    /// Parents and the fields of the foreign keys.
    pub(crate) belongs_to: Vec<(Path, Option<Ident>)>,
    pub(crate) backends: Option<Vec<Ident>>,
    pub(crate) none_is_default: bool,
}

/// The `#[diesel(..)]` attributes of a field.
#[derive(Default)]
pub(crate) struct DieselFieldAttributes {
    pub(crate) column: Option<Ident>,
    pub(crate) none_is_default: Option<bool>,
}

/// Calls `read` for each word of the attributes called `name`.
pub(crate) fn each(
    attributes: &[Attribute],
    name: &str,
    mut read: impl FnMut(ParseNestedMeta) -> Result<()>,
) -> Result<()> {
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident(name)) {
        // A bare attribute has no words.
        if matches!(attribute.meta, syn::Meta::List(_)) {
            attribute.parse_nested_meta(&mut read)?;
        }
    }
    Ok(())
}

pub(crate) fn of_struct(attributes: &[Attribute]) -> Result<DieselAttributes> {
    let mut words = DieselAttributes { none_is_default: true, ..DieselAttributes::default() };
    each(attributes, "diesel", |meta| {
        if meta.path.is_ident("table_name") {
            words.table = Some(path_or_text(&meta)?);
        } else if meta.path.is_ident("primary_key") {
            words.primary_key = Some(idents(&meta)?);
        } else if meta.path.is_ident("treat_none_as_default_value") {
            words.none_is_default = meta.value()?.parse::<syn::LitBool>()?.value;
        } else if meta.path.is_ident("check_for_backend") {
            let content;
            syn::parenthesized!(content in meta.input);
            let types = Punctuated::<Type, Token![,]>::parse_terminated(&content)?;
            words.backends = Some(types.iter().map(last_of_type).collect::<Result<_>>()?);
        } else if meta.path.is_ident("belongs_to") {
            let content;
            syn::parenthesized!(content in meta.input);
            let parent: Path = content.parse()?;
            let mut key = None;
            while !content.is_empty() {
                content.parse::<Token![,]>()?;
                if content.is_empty() {
                    break;
                }
                let word: Ident = content.parse()?;
                content.parse::<Token![=]>()?;
                let value = Ident::parse_any(&content)?;
                if word == "foreign_key" {
                    key = Some(value);
                }
            }
            words.belongs_to.push((parent, key));
        } else {
            skip(&meta)?;
        }
        Ok(())
    })?;
    Ok(words)
}

pub(crate) fn of_field(attributes: &[Attribute]) -> Result<DieselFieldAttributes> {
    let mut words = DieselFieldAttributes::default();
    each(attributes, "diesel", |meta| {
        for unfit in ["embed", "serialize_as", "select_expression"] {
            if meta.path.is_ident(unfit) {
                let reason = format!(
                    "`{unfit}` is not supported on an entity: each of its fields is a column. Leave the field out, or query it with `load`"
                );
                return Err(meta.error(reason));
            }
        }
        if meta.path.is_ident("column_name") {
            let path = path_or_text(&meta)?;
            words.column = Some(path.require_ident()?.clone());
        } else if meta.path.is_ident("treat_none_as_default_value") {
            words.none_is_default = Some(meta.value()?.parse::<syn::LitBool>()?.value);
        } else {
            skip(&meta)?;
        }
        Ok(())
    })?;
    Ok(words)
}

/// Identifiers in parentheses.
pub(crate) fn idents(meta: &ParseNestedMeta) -> Result<Vec<Ident>> {
    let content;
    syn::parenthesized!(content in meta.input);
    let idents = content.parse_terminated(Ident::parse_any, Token![,])?;
    Ok(idents.into_iter().collect())
}

pub(crate) fn paths(meta: &ParseNestedMeta) -> Result<Vec<Path>> {
    let content;
    syn::parenthesized!(content in meta.input);
    Ok(content.parse_terminated(Path::parse_mod_style, Token![,])?.into_iter().collect())
}

/// Parses `references(Parent, columns = (one, two))`.
pub(crate) fn references(meta: &ParseNestedMeta) -> Result<(Path, Vec<Ident>)> {
    const HOW: &str = "a foreign key of several columns is `references(Entity, columns = (one, two))`, in the order of the key of the entity; \
                       one of one column is `references = Entity` on its field";
    if !meta.input.peek(syn::token::Paren) {
        return Err(meta.error(HOW));
    }
    let content;
    let bracket = syn::parenthesized!(content in meta.input);
    let wrong = |span| Error::new(span, HOW);
    let parent: Path = content.parse().map_err(|_| wrong(content.span()))?;
    content.parse::<Token![,]>().map_err(|_| wrong(bracket.span.join()))?;
    let word = content.parse::<Ident>().map_err(|_| wrong(content.span()))?;
    if word != "columns" {
        return Err(wrong(word.span()));
    }
    if content.peek(Token![=]) {
        content.parse::<Token![=]>()?;
    }
    if !content.peek(syn::token::Paren) {
        return Err(wrong(content.span()));
    }
    let columns;
    syn::parenthesized!(columns in content);
    let idents = columns.parse_terminated(Ident::parse_any, Token![,])?;
    let _ = content.parse::<Option<Token![,]>>()?;
    if idents.len() < 2 || !content.is_empty() {
        return Err(wrong(word.span()));
    }
    Ok((parent, idents.into_iter().collect()))
}

/// A path, or a string literal with a path, as in older versions of Diesel.
fn path_or_text(meta: &ParseNestedMeta) -> Result<Path> {
    let value = meta.value()?;
    if value.peek(syn::LitStr) { value.parse::<syn::LitStr>()?.parse() } else { value.parse() }
}

/// Skips the value of a word that only Diesel reads.
fn skip(meta: &ParseNestedMeta) -> Result<()> {
    if meta.input.peek(Token![=]) {
        meta.value()?;
        while !meta.input.is_empty() && !meta.input.peek(Token![,]) {
            meta.input.parse::<proc_macro2::TokenTree>()?;
        }
    } else if meta.input.peek(syn::token::Paren) {
        let content;
        syn::parenthesized!(content in meta.input);
        content.parse::<TokenStream>()?;
    }
    Ok(())
}

pub(crate) fn last_of_type(ty: &Type) -> Result<Ident> {
    match ty {
        Type::Path(path) => path.path.segments.last().map(|last| last.ident.clone()),
        _ => None,
    }
    .ok_or_else(|| Error::new_spanned(ty, "expected a path"))
}

/// The table that Diesel derives from the name of a struct.
pub(crate) fn table_of(name: &Ident) -> Path {
    Ident::new(&format!("{}s", snake_case(&name.to_string())), name.span()).into()
}

pub(crate) fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    for (at, c) in name.char_indices() {
        if c.is_uppercase() && at > 0 {
            snake.push('_');
        }
        snake.extend(c.to_lowercase());
    }
    snake
}

pub(crate) fn unknown(meta: &ParseNestedMeta, known: &str) -> Error {
    let word = meta.path.get_ident().map_or_else(String::new, ToString::to_string);
    meta.error(format!("`{word}` is not known here; there is {known}"))
}

pub(crate) fn missing(span: Span, what: impl std::fmt::Display) -> Error {
    Error::new(span, what)
}
