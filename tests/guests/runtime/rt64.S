/* Start, interrupt entry and the catching of exceptions, for guests in 64-bit mode.
   The first 4 GiB are mapped to themselves by 2 MiB pages, for ring 0. */

        .section .multiboot, "ax"
        .balign 4
        .long   0x1badb002, 0, -0x1badb002

        .code32
        .globl  start
start:  cli
        cld
        mov     $boot_stack_top, %esp
        mov     %ebx, boot_info
        lgdt    gdt_pointer

        /* Page directories, the table of them, the top. */
        mov     $0x83, %eax
        xor     %ecx, %ecx
1:      mov     %eax, identity_pd(, %ecx, 8)
        add     $0x200000, %eax
        inc     %ecx
        cmp     $2048, %ecx
        jne     1b
        mov     $identity_pd + 3, %eax
        xor     %ecx, %ecx
1:      mov     %eax, identity_pdpt(, %ecx, 8)
        add     $0x1000, %eax
        inc     %ecx
        cmp     $4, %ecx
        jne     1b
        movl    $identity_pdpt + 3, identity_pml4
        mov     $start64, %ebp

        /* To 64-bit mode; goes on at EBP. Also the way of the other processors. */
        .globl  to_long_mode
to_long_mode:
        mov     $0x620, %eax            /* PAE, OSFXSR, OSXMMEXCPT */
        mov     %eax, %cr4
        mov     $identity_pml4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       /* EFER: LME, NXE */
        rdmsr
        or      $0x900, %eax
        wrmsr
        mov     $0x80010033, %eax       /* PG, WP, NE, ET, MP, PE */
        mov     %eax, %cr0
        ljmp    $8, $1f
        .code64
1:      mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        mov     %ebp, %ebp
        jmp     *%rbp

start64:
        lea     boot_stack_top(%rip), %rsp
        call    rt_start
1:      hlt
        jmp     1b

        /* Entries of all vectors, 16 bytes each. */
        .balign 16
        .globl  trap_entries
trap_entries:
        .set    vector, 0
        .rept   256
        .balign 16
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
        push    $0
        .endif
        push    $vector
        jmp     trapped
        .set    vector, vector + 1
        .endr

trapped:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        push    %rbp
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        cld
        mov     %rsp, %rdi
        mov     %rsp, %rbx
        and     $-16, %rsp
        call    on_trap
        mov     %rbx, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rbp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        add     $16, %rsp
        iretq

        /* word call_caught(function, argument): calls the function; a trap that on_trap gives to rt_resume ends it. */
        .globl  call_caught
call_caught:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        pushfq
        mov     %rsp, catch_sp(%rip)
        mov     %rdi, %rax
        mov     %rsi, %rdi
        sub     $8, %rsp
        call    *%rax
        add     $8, %rsp
        jmp     1f
        .globl  rt_resume
rt_resume:
        mov     catch_sp(%rip), %rsp
        mov     $0x10, %ecx
        mov     %ecx, %ss
1:      movq    $0, catch_sp(%rip)
        popfq
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        /* void go(struct far_state *): to another stack, code segment and ring by IRETQ. */
        .globl  go
go:     push    24(%rdi)
        push    8(%rdi)
        push    32(%rdi)
        push    16(%rdi)
        push    0(%rdi)
        mov     40(%rdi), %rdi
        iretq

        .data
        .balign 16
        .globl  gdt
gdt:    .quad   0
        .quad   0x00af9b000000ffff      /* 08 64-bit code */
        .quad   0x00cf93000000ffff      /* 10 data */
        .quad   0x00cf9b000000ffff      /* 18 32-bit code */
        .quad   0x008f9b000000ffff      /* 20 16-bit code, 4 GiB */
        .quad   0x00cffb000000ffff      /* 28 user 32-bit code */
        .quad   0x00cff3000000ffff      /* 30 user data */
        .quad   0x00affb000000ffff      /* 38 user 64-bit code */
        .fill   56, 8, 0                /* 40 ... the guest's own; from 100 on task state segments */
gdt_end:
        .globl  gdt_pointer
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
        .globl  catch_sp
catch_sp:
        .quad   0

        .bss
        .balign 4096
        .globl  identity_pml4, identity_pdpt, identity_pd
identity_pml4:
        .skip   4096
identity_pdpt:
        .skip   4096
identity_pd:
        .skip   4096 * 4
        .skip   16384
        .globl  boot_stack_top
boot_stack_top:
        .globl  boot_info
boot_info:
        .skip   8
        .section .note.GNU-stack, "", @progbits
