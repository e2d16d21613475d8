//! The model of an entity: its fields and attributes.

use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Fields, Ident, Path, Result, Type, Visibility};

use crate::backends::Backends;
use crate::words;

pub(crate) struct Model {
    pub(crate) name: Ident,
    pub(crate) visibility: Visibility,
    pub(crate) table: Path,
    pub(crate) fields: Vec<Field>,
    /// The indices of the fields of the key.
    pub(crate) key: Vec<usize>,
    pub(crate) backends: Backends,
    pub(crate) new: Option<Ident>,
    pub(crate) new_derive: Vec<Path>,
    pub(crate) row_by_row: bool,
    /// Foreign keys of several columns: the parent and the indices of the fields.
    pub(crate) references: Vec<(Path, Vec<usize>)>,
}

pub(crate) struct Field {
    pub(crate) name: Ident,
    pub(crate) visibility: Visibility,
    pub(crate) ty: Type,
    pub(crate) column: Ident,
    pub(crate) documentation: Vec<syn::Attribute>,
    pub(crate) generated: bool,
    pub(crate) version: bool,
    pub(crate) parent: Option<Path>,
}

/// The named fields of a struct without parameters.
pub(crate) fn named_fields<'i>(input: &'i DeriveInput, derive: &str) -> Result<Vec<&'i syn::Field>> {
    if !input.generics.params.is_empty() {
        return Err(Error::new_spanned(&input.generics, format!("`{derive}` is for structs without parameters")));
    }
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => Ok(fields.named.iter().collect()),
            _ => Err(Error::new_spanned(&input.ident, format!("`{derive}` is for structs with named fields"))),
        },
        _ => Err(Error::new_spanned(&input.ident, format!("`{derive}` is for structs"))),
    }
}

impl Model {
    pub(crate) fn read(input: &DeriveInput) -> Result<Self> {
        let fields = named_fields(input, "Entity")?;
        let diesel = words::of_struct(&input.attrs)?;
        let (mut new, mut new_derive, mut connections, mut row_by_row) = (None, Vec::new(), Vec::new(), false);
        let mut references = Vec::new();
        words::each(&input.attrs, "entity", |meta| {
            if meta.path.is_ident("new") {
                new = Some(meta.value()?.parse()?);
            } else if meta.path.is_ident("new_derive") {
                new_derive.extend(words::paths(&meta)?);
            } else if meta.path.is_ident("connection") {
                connections.push(meta.value()?.parse()?);
            } else if meta.path.is_ident("row_by_row") {
                row_by_row = true;
            } else if meta.path.is_ident("references") {
                references.push(words::references(&meta)?);
            } else {
                return Err(words::unknown(
                    &meta,
                    "`new = NewName`, `new_derive(..)`, `connection = ..`, `row_by_row` and `references(Entity, columns = (..))` on the struct, `generated`, `version` and `references = Entity` on a field",
                ));
            }
            Ok(())
        })?;
        let mut fields = fields.into_iter().map(Field::read).collect::<Result<Vec<_>>>()?;
        for (parent, key) in &diesel.belongs_to {
            let last = parent.segments.last().map(|last| last.ident.to_string()).unwrap_or_default();
            let key =
                key.clone().unwrap_or_else(|| Ident::new(&format!("{}_id", words::snake_case(&last)), parent.span()));
            let field = fields.iter_mut().find(|field| field.name == key || field.column == key);
            let Some(field) = field else {
                return Err(words::missing(
                    key.span(),
                    format!("there is no field `{key}`, the foreign key to `{last}`"),
                ));
            };
            field.parent.get_or_insert_with(|| parent.clone());
        }
        let names = diesel.primary_key.unwrap_or_else(|| vec![Ident::new("id", input.ident.span())]);
        let index = |name: &Ident| {
            fields.iter().position(|field| field.name == *name || field.column == *name).ok_or_else(|| {
                words::missing(
                    name.span(),
                    format!(
                        "there is no field `{name}`; an entity has its key, which `#[diesel(primary_key(..))]` names"
                    ),
                )
            })
        };
        let key = names.iter().map(index).collect::<Result<Vec<_>>>()?;
        let references = references
            .into_iter()
            .map(|(parent, names): (Path, Vec<Ident>)| {
                let fields = names.iter().map(|name| index_of(&fields, name)).collect::<Result<Vec<_>>>()?;
                Ok((parent, fields))
            })
            .collect::<Result<Vec<_>>>()?;
        let versions: Vec<usize> = (0..fields.len()).filter(|&index| fields[index].version).collect();
        if let Some(second) = versions.get(1) {
            return Err(Error::new(fields[*second].name.span(), "an entity has one version at most"));
        }
        if let Some(both) = versions.iter().find(|index| key.contains(index)) {
            return Err(Error::new(fields[*both].name.span(), "a key is no version"));
        }
        if fields.len() > 128 {
            return Err(Error::new(input.ident.span(), "an entity has 128 columns at most"));
        }
        Ok(Self {
            name: input.ident.clone(),
            visibility: input.vis.clone(),
            table: diesel.table.unwrap_or_else(|| words::table_of(&input.ident)),
            fields,
            key,
            backends: Backends { named: diesel.backends, connections },
            new,
            new_derive,
            row_by_row,
            references,
        })
    }

    /// All foreign keys: the parent and the indices of the fields, in the order of the parent's key.
    pub(crate) fn foreign_keys(&self) -> impl Iterator<Item = (&Path, Vec<usize>)> {
        let single_column =
            self.fields.iter().enumerate().filter_map(|(index, field)| Some((field.parent.as_ref()?, vec![index])));
        single_column.chain(self.references.iter().map(|(parent, fields)| (parent, fields.clone())))
    }

    pub(crate) fn version(&self) -> Option<&Field> {
        self.fields.iter().find(|field| field.version)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Field> {
        self.key.iter().map(|&index| &self.fields[index])
    }

    /// The fields that an UPDATE may set, with their indices.
    pub(crate) fn updatable(&self) -> impl Iterator<Item = (usize, &Field)> {
        self.fields.iter().enumerate().filter(|(index, field)| !field.version && !self.key.contains(index))
    }

    /// The field of the key that can be an AUTO_INCREMENT: the only field, or the only one of several that the database
    /// makes.
    pub(crate) fn auto_increment_key(&self) -> Option<&Field> {
        if let [key] = self.key[..] {
            return Some(&self.fields[key]);
        }
        let mut generated = self.keys().filter(|field| field.generated);
        generated.next().filter(|_| generated.next().is_none())
    }
}

fn index_of(fields: &[Field], name: &Ident) -> Result<usize> {
    fields.iter().position(|field| field.name == *name || field.column == *name).ok_or_else(|| {
        words::missing(name.span(), format!("there is no field `{name}`; `references` names fields of this struct"))
    })
}

impl Field {
    fn read(field: &syn::Field) -> Result<Self> {
        let name = field.ident.clone().ok_or_else(|| Error::new(field.span(), "a field has a name"))?;
        let diesel = words::of_field(&field.attrs)?;
        let (mut generated, mut version, mut parent) = (false, false, None);
        words::each(&field.attrs, "entity", |meta| {
            if meta.path.is_ident("generated") {
                generated = true;
            } else if meta.path.is_ident("version") {
                version = true;
            } else if meta.path.is_ident("references") {
                if meta.input.peek(syn::token::Paren) {
                    return Err(meta.error(
                        "a foreign key of one column is `references = Entity`; one of several columns stands on the struct: \
                         `#[entity(references(Entity, columns = (one, two)))]`",
                    ));
                }
                parent = Some(meta.value()?.parse()?);
            } else {
                return Err(words::unknown(&meta, "`generated`, `version` and `references = Entity` on a field"));
            }
            Ok(())
        })?;
        Ok(Self {
            column: diesel.column.unwrap_or_else(|| name.clone()),
            name,
            visibility: field.vis.clone(),
            ty: field.ty.clone(),
            documentation: field.attrs.iter().filter(|attribute| attribute.path().is_ident("doc")).cloned().collect(),
            generated,
            version,
            parent,
        })
    }

    pub(crate) fn is_optional(&self) -> bool {
        is_optional(&self.ty)
    }

    pub(crate) fn is_text(&self) -> bool {
        words::last_of_type(&self.ty).is_ok_and(|last| last == "String")
    }
}

pub(crate) fn is_optional(ty: &Type) -> bool {
    words::last_of_type(ty).is_ok_and(|last| last == "Option")
}
