//! New rows: the struct that `#[entity(new = ..)]` generates, and `#[derive(NewEntity)]` for a struct of the program.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Error, Ident, Path, Result};

use crate::backends::{Backend, Backends, support_path};
use crate::model::{Field, Model, is_optional, named_fields};
use crate::words;

/// A new row, as the implementations need it.
struct NewRow<'m> {
    name: &'m Ident,
    entity: TokenStream,
    table: &'m Path,
    columns: usize,
    /// The fields that the new row and the entity have in common: the name in the new row, and the name in the entity.
    common: Vec<(&'m Ident, &'m Ident)>,
    all: Vec<&'m Ident>,
    /// The fields of the key, if the program makes the key.
    key: Option<Vec<&'m Ident>>,
    row_by_row: bool,
    /// A field may leave its column to the default. SQLite supports no `DEFAULT` in an INSERT of several rows.
    has_defaults: bool,
    /// Statements that add the references of foreign keys of several columns.
    composite: Vec<TokenStream>,
    backends: &'m Backends,
}

/// The struct of new rows for `#[entity(new = ..)]`.
pub(crate) fn generated(model: &Model) -> TokenStream {
    let Some(new) = &model.new else { return TokenStream::new() };
    let support = support_path();
    let Model { name, visibility, table, .. } = model;
    let fields: Vec<&Field> = model.fields.iter().filter(|field| !field.generated && !field.version).collect();
    let declarations = fields.iter().map(|field| {
        let Field { name, visibility, ty, column, documentation, .. } = field;
        let ty = match &field.parent {
            Some(parent) if field.is_optional() => {
                quote!(::core::option::Option<::diesel_session::unit_of_work::Fk<#parent>>)
            }
            Some(parent) => quote!(::diesel_session::unit_of_work::Fk<#parent>),
            None => quote!(#ty),
        };
        quote! {
            #(#documentation)*
            #[diesel(column_name = #column)]
            #visibility #name: #ty
        }
    });
    let documentation = format!("A new [`{name}`], for `Session::add`.");
    let usual =
        ["Debug", "Clone"].into_iter().filter(|usual| !model.new_derive.iter().any(|path| path.is_ident(usual)));
    let usual = usual.map(|usual| Ident::new(usual, name.span()));
    let derives = &model.new_derive;
    let all: Vec<&Ident> = fields.iter().map(|field| &field.name).collect();
    let program_makes_key = model.keys().all(|key| !key.generated);
    let row = NewRow {
        name: new,
        entity: quote!(#name),
        table,
        columns: fields.len(),
        common: all.iter().map(|&name| (name, name)).collect(),
        all,
        key: program_makes_key.then(|| model.keys().map(|key| &key.name).collect()),
        row_by_row: false,
        has_defaults: false,
        composite: composite(model),
        backends: &model.backends,
    };
    let implementations = implementations(&row);
    // These checks make the compiler report the actual mistake before the missing traits of Diesel.
    let parents = fields.iter().filter_map(|field| field.parent.as_ref()).map(|parent| match parent.is_ident("Self") {
        true => quote!(#name),
        false => quote!(#parent),
    });
    quote! {
        const _: fn() = || {
            fn is_one_column<P: #support::OneColumnKey>() {}
            #(is_one_column::<#parents>();)*
        };

        #[doc = #documentation]
        #[derive(#(#usual,)* #(#derives,)* ::diesel::Insertable)]
        #[diesel(table_name = #table, treat_none_as_default_value = false)]
        #[allow(missing_docs)]
        #visibility struct #new {
            #(#declarations,)*
        }

        #implementations
    }
}

/// The references of foreign keys of several columns, if the program makes all columns of the key.
fn composite(model: &Model) -> Vec<TokenStream> {
    let support = support_path();
    let is_made = |index: &usize| {
        let field = &model.fields[*index];
        !field.generated && !field.version && field.parent.is_none()
    };
    let several = model.references.iter().filter(|(_, fields)| fields.iter().all(is_made));
    several
        .map(|(parent, fields)| {
            let parts = fields.iter().map(|&index| {
                let (name, optional) = (&model.fields[index].name, model.fields[index].is_optional());
                let question_mark = optional.then(|| quote!(?));
                quote!(::core::clone::Clone::clone(&new.#name)#question_mark)
            });
            let parent = match parent.is_ident("Self") {
                true => {
                    let name = &model.name;
                    quote!(#name)
                }
                false => quote!(#parent),
            };
            quote! {
                found.extend((|new: &Self| -> ::core::option::Option<#support::Reference> {
                    #[allow(unused_imports)]
                    use #support::{EntityParent as _, OtherParent as _};
                    let parent = (&&#support::Parent::<#parent>(::core::marker::PhantomData)).table();
                    ::core::option::Option::Some(#support::Reference::new(parent, (#(#parts,)*)))
                })(self));
            }
        })
        .collect()
}

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    const KNOWN: &str = "`#[entity(Entity, key(..), connection = .., row_by_row)]` on the struct and `#[entity(write_only)]` on a field";
    let fields = named_fields(input, "NewEntity")?;
    let diesel = words::of_struct(&input.attrs)?;
    let (mut entity, mut key, mut connections, mut row_by_row) = (None, None, Vec::new(), false);
    words::each(&input.attrs, "entity", |meta| {
        if meta.path.is_ident("key") {
            key = Some(words::idents(&meta)?);
        } else if meta.path.is_ident("connection") {
            connections.push(meta.value()?.parse()?);
        } else if meta.path.is_ident("row_by_row") {
            row_by_row = true;
        } else if entity.is_none() && !meta.input.peek(syn::Token![=]) && !meta.input.peek(syn::token::Paren) {
            entity = Some(meta.path.clone());
        } else {
            return Err(words::unknown(&meta, KNOWN));
        }
        Ok(())
    })?;
    let Some(entity) = entity else {
        return Err(Error::new(input.ident.span(), "name the entity that this is a new row of: `#[entity(User)]`"));
    };
    let mut common = Vec::new();
    let mut all = Vec::new();
    let mut has_defaults = false;
    for field in fields {
        let name = field.ident.as_ref().ok_or_else(|| Error::new(field.span(), "a field has a name"))?;
        let mut write_only = false;
        words::each(&field.attrs, "entity", |meta| {
            if !meta.path.is_ident("write_only") {
                return Err(words::unknown(&meta, KNOWN));
            }
            write_only = true;
            Ok(())
        })?;
        all.push(name);
        if !write_only {
            common.push((name, name));
        }
        let words = words::of_field(&field.attrs)?;
        has_defaults |= is_optional(&field.ty) && words.none_is_default.unwrap_or(diesel.none_is_default);
    }
    let key = match &key {
        Some(names) => {
            let find = |name: &Ident| {
                all.iter()
                    .copied()
                    .find(|field| *field == name)
                    .ok_or_else(|| Error::new(name.span(), format!("there is no field `{name}`")))
            };
            Some(names.iter().map(find).collect::<Result<Vec<_>>>()?)
        }
        None => None,
    };
    let table = diesel.table.clone().unwrap_or_else(|| words::table_of(&input.ident));
    let backends = Backends { named: diesel.backends, connections };
    Ok(implementations(&NewRow {
        name: &input.ident,
        entity: quote!(#entity),
        table: &table,
        columns: all.len(),
        common,
        all,
        key,
        row_by_row,
        has_defaults,
        composite: Vec::new(),
        backends: &backends,
    }))
}

fn implementations(row: &NewRow) -> TokenStream {
    let support = support_path();
    let NewRow { name, entity, all, row_by_row, composite, .. } = row;
    let in_batches = match &row.key {
        Some(_) => quote!(true),
        None => quote!(<#entity as ::diesel_session::Entity>::is_auto_increment()),
    };
    let imports = quote! {
        #[allow(unused_imports)]
        use #support::{ComparablePair as _, ForeignKeyField as _, OptionalForeignKeyField as _, ValueField as _, OptionalForeignKeyPair as _, IncomparablePair as _, ForeignKeyPair as _};
    };
    let key = match &row.key {
        None => quote!(::core::option::Option::None),
        Some(key) => match &key[..] {
            [one] => {
                quote!((&#support::Field(&self.#one)).key_part().map(::core::convert::Into::into))
            }
            several => {
                quote!(::core::option::Option::Some((#(::core::convert::Into::into((&#support::Field(&self.#several)).key_part()?),)*)))
            }
        },
    };
    let differs = row.common.iter().enumerate().map(|(index, (new, old))| {
        let differs = quote_spanned!(new.span()=> row.#old);
        quote!(if (&&&#support::FieldPair(&self.#new, &#differs)).differs() { columns |= 1u128 << #index; })
    });
    let insert = row.backends.each(|backend, connection| insert(row, backend, connection));
    quote! {
        impl ::diesel_session::NewEntity for #name {
            type Entity = #entity;

            fn in_batches() -> bool {
                #in_batches && !#row_by_row && !<#entity as ::diesel_session::Entity>::ROW_BY_ROW
            }

            fn key(&self) -> ::core::option::Option<<#entity as ::diesel_session::Entity>::Id> {
                #imports
                #key
            }

            fn bytes(&self) -> usize {
                #[allow(unused_imports)]
                use #support::{BytesField as _, SizedField as _, OptionalBytesField as _};
                0usize #(+ (&&&#support::Field(&self.#all)).bytes())*
            }

            fn is_ready(&self) -> bool {
                #imports
                true #(&& (&#support::Field(&self.#all)).reference().is_some())*
            }

            fn references(&self) -> ::std::vec::Vec<#support::Reference> {
                #imports
                #[allow(unused_mut)]
                let mut found: ::std::vec::Vec<#support::Reference> = ::std::vec::Vec::new();
                #(found.extend((&#support::Field(&self.#all)).reference().flatten());)*
                #(#composite)*
                found
            }

            #[allow(clippy::needless_borrow)]
            fn disagreements(&self, row: &#entity) -> u128 {
                #imports
                let mut columns = 0u128;
                let _ = row;
                #(#differs)*
                columns |= 0;
                columns
            }
        }

        #insert
    }
}

fn insert(row: &NewRow, backend: Backend, connection: &TokenStream) -> TokenStream {
    let support = support_path();
    let NewRow { name, entity, table, columns, .. } = row;
    let db = quote!(<#connection as ::diesel::Connection>::Backend);
    let returning = quote!(<#entity as ::diesel::SelectableHelper<#db>>::as_returning());
    // A statement of more than a thousand rows is not faster.
    let max_rows = |binds: usize| 1000.min(binds / (*columns).max(1));
    let (max_rows, body) = match backend {
        Backend::Postgres => (
            max_rows(65_535),
            quote! {
                ::diesel::insert_into(#table::table).values(rows.to_vec()).returning(#returning).get_results(conn)
            },
        ),
        Backend::Sqlite if row.has_defaults => (
            1,
            quote! {
                let mut inserted = ::std::vec::Vec::with_capacity(rows.len());
                for row in rows {
                    let returned: ::std::vec::Vec<#entity> =
                        ::diesel::insert_into(#table::table).values(*row).returning(#returning).get_results(conn)?;
                    inserted.extend(returned);
                }
                ::core::result::Result::Ok(inserted)
            },
        ),
        Backend::Sqlite => (
            max_rows(32_766),
            quote! {
                ::diesel::insert_into(#table::table).values(rows.to_vec()).returning(#returning).get_results(conn)
            },
        ),
        Backend::Mysql => (
            max_rows(65_535),
            quote! {
                ::diesel::insert_into(#table::table).values(rows.to_vec()).execute(conn)?;
                #support::read_back(conn, rows)
            },
        ),
        Backend::Any => (
            1,
            quote! {
                let mut inserted = ::std::vec::Vec::with_capacity(rows.len());
                for row in rows {
                    let insert = ::diesel::insert_into(#table::table).values(*row);
                    if returning {
                        let selection = <#entity as ::diesel::SelectableHelper<#db>>::as_select();
                        let returned: ::std::vec::Vec<#entity> =
                            #support::returning(insert, selection).get_results(conn)?;
                        inserted.extend(returned);
                    } else {
                        insert.execute(conn)?;
                        inserted.extend(#support::read_back(conn, &[*row])?);
                    }
                }
                ::core::result::Result::Ok(inserted)
            },
        ),
    };
    quote! {
        impl ::diesel_session::unit_of_work::Insert<#connection> for #name {
            const MAX_INSERT_ROWS: usize = #max_rows;

            fn insert(conn: &mut #connection, rows: &[&Self], returning: bool) -> ::diesel::QueryResult<::std::vec::Vec<#entity>> {
                #[allow(unused_imports)]
                use ::diesel::RunQueryDsl as _;
                let _ = returning;
                #body
            }
        }
    }
}
