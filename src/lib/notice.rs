//! What an operation has to say beside its result: nothing failed, and still somebody should know.
//!
//! It is told through [`crate::progress::Progress::notice`], when it is known: what decides how a target is written, before the work.

use std::path::PathBuf;

/// Who is told what there is to say.
pub(crate) type Told<'a> = &'a dyn Fn(&Notice);

/// Something to know about a target.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The file is written where it lies, because its name cannot be given to another file: from the first write on its old content
    /// is lost.
    InPlace {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: InPlace,
    },
    /// The file has other names, which keep the old content.
    OtherNames {
        /// The file.
        path: PathBuf,
        /// How many other names.
        count: u64,
    },
    /// What the file had and the one that replaces it will not have.
    NotKept {
        /// The file.
        path: PathBuf,
        /// What.
        what: Vec<Lost>,
    },
    /// The content is on the disk, but whether the name is cannot be made sure of.
    NameNotSynced {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        reason: String,
    },
}

/// Why a file is written where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InPlace {
    /// It was given as a descriptor of a process, as `/dev/fd/3`.
    Descriptor,
    /// It is mounted there, as in a container.
    MountPoint,
    /// Its name, or its directory, may not be changed. What the operating system says.
    Directory(String),
}

/// Something that a file had and that its successor has not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lost {
    /// The owner.
    Owner {
        /// What it was.
        was: u32,
        /// What it is.
        is: u32,
    },
    /// The group.
    Group {
        /// What it was.
        was: u32,
        /// What it is.
        is: u32,
    },
    /// Permissions, where not all could be kept without giving somebody more than he had.
    Mode {
        /// What they were.
        was: u32,
        /// What they are.
        is: u32,
    },
    /// The access control list, or parts of it.
    Acl,
    /// An extended attribute; security labels are such.
    Attribute(String),
    /// Flags of the file, in the letters of `lsattr`.
    Flags(String),
}
